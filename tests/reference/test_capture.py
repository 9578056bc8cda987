"""The step in a CUDA graph does what the step without one does; what cannot be captured is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conformance.recording import record
from reference.checkpoint.resume import computed_as_by
from reference.config import ConfigurationError, GPTConfig, TrainConfig
from reference.optimizers.build import build_optimizer, load_optimizer_state, optimizer_state
from reference.training.capture import captured, settings
from reference.training.trainer import Trainer
from reference.training.update import TrainingError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = GPTConfig.gpt2(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)


def test_a_class_that_is_not_capturable_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"SGD does not accept 'capturable'.*: set capture_step=False"):
        captured(torch.optim.SGD)


def test_the_class_stays_the_one_it_was() -> None:
    optimizer = build_optimizer("torch.optim.AdamW", {"lr": 0.1}, nn.Linear(2, 2), torch.device("cpu"), capture=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "CapturedAdamW"
    assert [group["capturable"] for group in optimizer.param_groups] == [True, True]
    with pytest.raises(ConfigurationError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


def test_gradients_stay_where_they_are() -> None:
    model = nn.Linear(2, 2)
    captured_class: Any = captured(torch.optim.AdamW)
    optimizer = captured_class(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    before = [parameter.grad for parameter in model.parameters()]
    optimizer.zero_grad()
    assert [parameter.grad.sum().item() for parameter in model.parameters() if parameter.grad is not None] == [0.0, 0.0]
    model(torch.ones(1, 2)).sum().backward()
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), before, strict=True))
    given = settings(optimizer)
    optimizer.param_groups[0]["lr"] = 1.0  # handed over as a number at every step
    assert settings(optimizer) == given
    optimizer.param_groups[0]["weight_decay"] = 0.5  # written into the graph
    assert settings(optimizer) != given


def test_a_state_that_was_saved_without_a_graph_is_stepped_with_one_and_the_other_way_round() -> None:
    def built(capture: bool, **arguments: Any) -> torch.optim.Optimizer:
        arguments = {"lr": 0.1, "fused": False} | arguments
        return build_optimizer("torch.optim.AdamW", arguments, nn.Linear(2, 2), torch.device("cpu"), capture=capture)

    plain, graph = built(False), built(True)
    for group in plain.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    plain.step()
    saved = optimizer_state(plain)
    load_optimizer_state(graph, computed_as_by(graph, saved))
    assert [group["capturable"] for group in graph.param_groups] == [True, True]
    assert [group["capturable"] for group in saved["param_groups"]] == [False, False]  # left as it was
    load_optimizer_state(plain, computed_as_by(plain, optimizer_state(graph)))
    assert [group["capturable"] for group in plain.param_groups] == [False, False]
    plain.step()  # with capturable=True, PyTorch refuses it on a CPU
    foreach = built(False, fused=None, foreach=True)
    load_optimizer_state(foreach, computed_as_by(foreach, saved))
    assert [(group["foreach"], group["fused"]) for group in foreach.param_groups] == [(True, None)] * 2


def parameters_after(optimizer_class: Any, steps: int, change: int | None = None) -> tuple[list[Tensor], Any]:
    """Parameters after some steps with given gradients and a schedule; settings change before step ``change``."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    model = [torch.randn(n, 3, device="cuda", generator=generator, requires_grad=True) for n in (5, 700)]
    groups: Any = [{"params": model[:1], "weight_decay": 0.1}, {"params": model[1:], "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, lr=0.1, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
            if step == change:
                group["betas"] = (0.5, 0.9)
        for tensor in model:
            noise = torch.randn(tensor.shape, device="cuda", generator=generator)
            tensor.grad = noise if tensor.grad is None else tensor.grad.copy_(noise)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return [tensor.detach() for tensor in model], optimizer


@needs_gpu
@pytest.mark.parametrize("change", [None, 3])
def test_a_replay_is_bit_equal_to_the_step(change: int | None) -> None:
    plain, _ = parameters_after(lambda *a, **k: torch.optim.AdamW(*a, **k, capturable=True), 6, change)
    replayed, optimizer = parameters_after(captured(torch.optim.AdamW), 6, change)
    assert optimizer.graph is not None
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 6] * 2  # plain numbers, as before


@needs_gpu
def test_a_loaded_state_is_captured_anew() -> None:
    optimizer: Any = parameters_after(captured(torch.optim.AdamW), 3)[1]
    optimizer.load_state_dict(optimizer.state_dict())
    forgotten = optimizer.graph is None
    assert forgotten
    before = [tensor.clone() for group in optimizer.param_groups for tensor in group["params"]]
    optimizer.step()
    assert optimizer.graph is not None
    after = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def fit(batches: list[Tensor], **changes: Any) -> Any:
    config = TrainConfig(**{"updates": 4, "accelerator": "cuda", "warmup": 2, **changes})
    return Trainer(SHAPE, config).fit(batches)


@pytest.fixture
def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (4, 17), generator=generator) for _ in range(4)]


@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_with_a_captured_step_is_bit_equal(tokens: list[Tensor], precision: str) -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the only one whose backward is the same each time
        plain = fit(tokens, precision=precision, optimizer_args={"lr": 1e-2, "capturable": True})
        with record() as trace:
            replayed = fit(tokens, precision=precision, optimizer_args={"lr": 1e-2}, capture_step=True)
    assert len(trace.updates) == 4  # a replay is a step to those who watch
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, replayed.model.state_dict()[name]), name


@needs_gpu
def test_a_run_goes_on_with_a_graph_from_one_without_and_the_other_way_round(
    tokens: list[Tensor], tmp_path: Path
) -> None:
    def go_on(directory: Path, updates: int, resume: Any, **changes: Any) -> Any:
        common: dict[str, Any] = {"updates": updates, "schedule": "constant", "accelerator": "cuda", "save_every": 2}
        return Trainer(SHAPE, TrainConfig(**common | changes), directory).fit(tokens, resume=resume)

    capturable: dict[str, Any] = {"optimizer_args": {"lr": 1e-2, "capturable": True}}
    given: dict[str, Any] = {"optimizer_args": {"lr": 1e-2}}
    with sdpa_kernel(SDPBackend.MATH):
        go_on(tmp_path / "plain", 2, False, **given)
        go_on(tmp_path / "graph", 2, False, capture_step=True, **given)
        for first in ("plain", "graph"):
            ends = []
            for number, changes in enumerate((given | {"capture_step": True}, capturable, given)):
                shutil.copytree(tmp_path / first, tmp_path / f"{first} {number}")
                ended = go_on(tmp_path / f"{first} {number}", 4, "auto", **changes)
                assert [record.update for record in ended.records] == [3, 4]
                ends.append(ended.model.state_dict())
            for name, tensor in ends[0].items():
                assert torch.equal(tensor, ends[1][name]), name
                torch.testing.assert_close(tensor, ends[2][name])


@needs_gpu
@pytest.mark.parametrize("capture_step", [False, True])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tokens: list[Tensor], capture_step: bool) -> None:
    seen: dict[str, Any] = {}

    def poison(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # what comes from the graph of a broken backward
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        seen["before"] = [tensor.detach().clone() for tensor in tensors]
        seen["tensors"] = tensors

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 64)
            self.calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            logits: Tensor = self.table(ids)
            return logits * torch.nan if self.calls == 3 else logits

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    hook = register_optimizer_step_pre_hook(poison)
    config = TrainConfig(updates=4, accelerator="cuda", capture_step=capture_step)
    try:
        with pytest.raises(TrainingError, match="the loss is nan at update 3 on rank 0"):
            Trainer(Poisoned, config).fit(tokens)
    finally:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["tensors"], strict=True))
    assert all(tensor.isfinite().all() for tensor in seen["tensors"])
