"""GrokAdamW against the package grokadamw: the same bits on the CPU, and a state that survives a file."""

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.optimizers.grokadamw import GrokAdamW

SHAPES = [(40, 30), (257,), (3, 5, 7), (1,), (), (128, 64)]
pytestmark = pytest.mark.filterwarnings(
    # grokadamw 0.1.2 opens torch.cuda.amp.autocast at every step: deprecated, and off without a GPU.
    "ignore:.*torch.cuda.amp.autocast:FutureWarning",
    "ignore:.*CUDA is not available:UserWarning",
)
DEVICES = [
    pytest.param("cpu"),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def package() -> Any:
    handlers = list(logging.root.handlers)
    module = pytest.importorskip("grokadamw.grokadamw")
    logging.root.handlers[:] = handlers  # it calls logging.basicConfig
    return module.GrokAdamW


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def give_gradients(tensors: list[nn.Parameter], update: int, without: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + update)
    for i, tensor in enumerate(tensors):
        gradient = torch.randn(tensor.shape, generator=generator) * 10.0 ** ((i + update) % 3 - 2)
        tensor.grad = None if i == without else gradient.to(tensor.device, tensor.dtype)


def both(updates: int = 12, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients after the same updates by this class and by the package's."""
    found = []
    for optimizer_class in (GrokAdamW, package()):
        tensors = parameters(dtype)
        groups: list[dict[str, Any]] = [{"params": tensors[:4]}, {"params": tensors[4:], "lr": 3e-3}]
        optimizer = optimizer_class(groups, **settings)
        for update in range(updates):
            give_gradients(tensors, update, without=1 if update % 4 == 2 else None)
            if update == 5:
                optimizer.param_groups[0].update(lr=2e-4, train_loss=1.5, eval_loss=2.5)
            optimizer.step()
        found.append([*[t.detach() for t in tensors], *[t.grad for t in tensors if t.grad is not None]])
    return found[0], found[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clipping": 0.0, "weight_decay": 0.0},
        {"gradient_clipping": 0.37, "gamma": 0.0, "lamb": 5.0, "betas": (0.8, 0.95), "eps": 1e-6},
        {"grokking_signal_fns": [lambda: 0.3, lambda: None, lambda: 1.0], "grokking_signal_decay_rate": 0.7},
        {"grokking_signal_fns": [lambda: None]},
        {"alpha_init": 1.0},
    ],
    ids=["defaults", "no clipping", "other numbers", "signals", "no signal", "alpha 1"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_computes_the_packages_numbers_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = both(dtype=dtype, **settings)
    assert len(ours) == 2 * len(SHAPES)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_each_setting_matters() -> None:
    plain, _ = both()
    for name, value in {"lamb": 1.0, "gamma": 0.2, "alpha_init": 0.9, "gradient_clipping": 0.5, "eps": 1e-2}.items():
        settings: dict[str, Any] = {name: value}
        other, _ = both(**settings)
        assert not torch.equal(plain[0] if name != "gamma" else plain[2], other[0] if name != "gamma" else other[2])


@pytest.mark.parametrize("device", DEVICES)
def test_the_state_lies_where_the_parameters_are_and_survives_a_file(device: str) -> None:
    def signal() -> float:
        return 0.5

    tensors = parameters(device=device)
    optimizer = GrokAdamW(tensors, grokking_signal_fns=[signal])
    for update in range(3):
        give_gradients(tensors, update)
        optimizer.step()
    assert all(optimizer.state[t][key].device == t.device for t in tensors for key in ("exp_avg", "grok_ema"))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)  # the function must not be in it
    buffer.seek(0)
    resumed = [nn.Parameter(tensor.detach().clone()) for tensor in tensors]
    other = GrokAdamW(resumed, grokking_signal_fns=[signal])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert optimizer.param_groups[0]["grokking_signal_fns"] == [signal]
    for update in range(3, 6):
        for these, one in ((tensors, optimizer), (resumed, other)):
            give_gradients(these, update)
            one.step()
    for a, b in zip(tensors, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_computes_what_the_cpu_does_without_waiting() -> None:
    near, far = parameters(), parameters(device="cuda")
    one, other = GrokAdamW(near), GrokAdamW(far)
    for update in range(6):
        for tensors in (near, far):
            give_gradients(tensors, update)
        one.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            other.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(near, far, strict=True):
        assert torch.allclose(a, b.cpu(), rtol=1e-5, atol=1e-6)


def test_a_signal_that_raises_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        raise RuntimeError("no loss yet")

    functions: list[Callable[[], float]] = [broken, lambda: 0.25]
    tensors, plain = parameters(), parameters()
    for these, given in ((tensors, functions), (plain, functions[1:])):
        give_gradients(these, 0)
        GrokAdamW(these, grokking_signal_fns=list(given)).step()
    assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))
    assert "no loss yet" in caplog.text


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"alpha_init": 1.5}, {"eps": -1e-8}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="GrokAdamW needs"):
            GrokAdamW(parameters(), **settings)  # type: ignore[arg-type] # some are wrong
