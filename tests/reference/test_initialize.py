"""Initial weights: the table, its independence of everything but seed and name, and building on the meta device."""

import logging
import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from reference.config import GPTConfig
from reference.errors import ConfigurationError
from reference.model.embedding import swap_embeddings
from reference.model.gpt import GPT
from reference.model.initialization import (
    build,
    choose_strategy,
    derive_seed,
    is_large,
    materialize,
    require_reset_parameters,
    reset,
)

SHAPE: dict[str, Any] = {"vocab_size": 256, "block_size": 64, "n_layer": 3, "n_head": 2, "n_embd": 64}
TINY: dict[str, Any] = {"vocab_size": 17, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}
BUILDS = {
    "gpt2": GPTConfig.gpt2(**TINY),
    "gpt2-untied": GPTConfig.gpt2(**TINY, tie_embeddings=False),
    "llama": GPTConfig.llama(**TINY),
    "llama-tied": GPTConfig.llama(**TINY, tie_embeddings=True),
}
CPU = torch.device("cpu")


class Bare(nn.Module):
    """Holds a parameter and has no reset_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Tied(nn.Module):
    """A module of another library: no table, but layers that know how to reset themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters under all their names, and all buffers, persistent or not."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_bit_equal(first: nn.Module, second: nn.Module) -> None:
    left, right = tensors(first), tensors(second)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("config", BUILDS.values(), ids=BUILDS)
def test_large_models_are_drawn_by_threads_and_are_the_same(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = GPT(config, seed=3)
    threads: set[str] = set()

    def watched(module: nn.Module) -> None:
        threads.add(threading.current_thread().name)
        reset(module)

    monkeypatch.setattr("reference.model.initialization.is_large", lambda _: True)
    monkeypatch.setattr("reference.model.initialization.reset", watched)
    assert_bit_equal(GPT(config, seed=3), alone)
    assert threads
    assert threading.current_thread().name not in threads


def test_a_thread_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.model.initialization.is_large", lambda _: True)
    monkeypatch.setattr("reference.model.initialization.generator", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        GPT(BUILDS["gpt2"])


def test_threads_are_for_large_and_real_tensors() -> None:
    with torch.device("meta"):
        layers = nn.Linear(4000, 4000)
    assert not is_large(layers)
    assert is_large(layers.to_empty(device=CPU))
    assert not is_large(nn.Linear(10, 10))
    with FakeTensorMode():
        assert not is_large(nn.Linear(4000, 4000))


@pytest.mark.parametrize("config", BUILDS.values(), ids=BUILDS)
def test_nothing_is_left_as_the_memory_was(config: GPTConfig) -> None:
    """The layers' own initialisation is skipped, so each tensor must be filled by the table."""
    alone = GPT(config)
    torch.use_deterministic_algorithms(True)  # fills memory that is not initialised with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert_bit_equal(GPT(config), alone)
    finally:
        torch.use_deterministic_algorithms(False)


def expected_std(name: str, config: GPTConfig) -> float:
    """The table of reference.model.initialization, written down a second time."""
    scaled = config.scale_residual_init and name.endswith(("attention.proj.weight", "mlp.proj.weight"))
    return config.init_std / (6**0.5 if scaled else 1.0)  # 2 L = 6


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig.gpt2(**SHAPE),
        GPTConfig.gpt2(**SHAPE, init_std=0.5),
        GPTConfig.gpt2(**SHAPE, scale_residual_init=False),
        GPTConfig.gpt2(**SHAPE, tie_embeddings=False),
        GPTConfig.llama(**SHAPE),
        GPTConfig.llama(**SHAPE, norm="layernorm", bias=True),
    ],
    ids=["gpt2", "std", "unscaled", "untied", "llama", "llama-bias"],
)
def test_table(config: GPTConfig) -> None:
    for name, parameter in GPT(config).named_parameters():
        values = parameter.detach().double()
        if name.endswith("bias"):
            assert (values == 0).all(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        else:
            std, count = expected_std(name, config), values.numel()
            # Five standard errors of the mean and of the standard deviation of a normal sample.
            assert values.mean().abs() < 5 * std / count**0.5, name
            assert abs(values.std().item() / std - 1) < 5 / (2 * count) ** 0.5, name
            assert values.abs().max() > 3 * std, f"{name} is not normal"


def test_weights_depend_on_name_and_seed_only() -> None:
    torch.manual_seed(0)
    first = GPT(GPTConfig.gpt2(**TINY, scale_residual_init=False), seed=7)
    torch.manual_seed(123)
    torch.rand(1000)
    larger = GPT(
        GPTConfig.gpt2(**{**TINY, "n_layer": 4}, scale_residual_init=False, tie_embeddings=False, dropout=0.5), seed=7
    )
    expected = tensors(larger)
    for name, tensor in tensors(first).items():
        if name != "head.weight":  # tied here, and there a tensor of its own
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", BUILDS)
def test_bfloat16_build_is_the_rounded_float32_build(name: str) -> None:
    wide = GPT(BUILDS[name])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        narrow = GPT(BUILDS[name])
    finally:
        torch.set_default_dtype(before)
    assert narrow.embedding.weight.dtype == torch.bfloat16
    assert_bit_equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_build_is_the_cpu_build() -> None:
    with torch.device("cuda"):
        model = GPT(BUILDS["gpt2"])
    assert model.embedding.weight.is_cuda
    assert_bit_equal(model.cpu(), GPT(BUILDS["gpt2"]))


def test_two_seeds_and_two_names_differ() -> None:
    first, second = (tensors(GPT(BUILDS["gpt2-untied"], seed)) for seed in (1, 2))
    drawn = [name for name, tensor in first.items() if tensor.ndim == 2]
    assert len(drawn) == 3 + 2 * 4
    for name in drawn:
        assert not torch.equal(first[name], second[name]), name
    for kind in ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj"):
        assert not torch.equal(first[f"blocks.0.{kind}.weight"], first[f"blocks.1.{kind}.weight"]), kind
    assert not torch.equal(first["embedding.weight"], first["head.weight"])


def test_derived_seed() -> None:
    # The value, so that a run can be repeated in another process (hash() could not) and after an update of this code.
    assert derive_seed(1337, "embedding") == 6894839910495236259
    parts: list[tuple[int | str, ...]] = [(1, 2), (2, 1), (1, "x"), (12,), (1, 2, 0), (0, 0), (0, 1), (0, 0, 1)]
    seeds = {derive_seed(*each) for each in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BUILDS)
def test_meta_build_is_the_eager_build(name: str, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        eager, meta = (build(lambda: GPT(BUILDS[name], 3), way, CPU, sharded=False) for way in ("eager", "meta"))
    finally:
        torch.set_default_dtype(before)
    assert isinstance(meta, GPT)
    assert_bit_equal(meta, eager)
    assert (meta.head.weight is meta.embedding.weight) is BUILDS[name].tie_embeddings
    if meta.rotary is not None:
        assert meta.rotary.cos[0].eq(1).all()
        assert meta.rotary.sin[1].ne(0).all()
    ids = torch.arange(8).view(1, 8)
    if dtype == torch.float32:
        assert torch.equal(meta(ids), eager(ids))


def test_meta_build_under_sharding_is_left_to_the_strategy() -> None:
    model = build(lambda: GPT(BUILDS["llama"]), "meta", CPU, sharded=True)
    assert all(tensor.is_meta for tensor in tensors(model).values())


@pytest.mark.parametrize("name", BUILDS)
def test_every_module_resets_itself_to_the_table(name: str) -> None:
    """FSDP materialises a module and calls its reset_parameters: that must give what the constructor gave."""
    model = GPT(BUILDS[name], seed=3)
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.fill_(torch.nan)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            module.reset_parameters()  # type: ignore[operator] # the hook
    assert_bit_equal(model, GPT(BUILDS[name], seed=3))


def test_materialize_keeps_ties_and_frozen_tensors_of_any_module() -> None:
    with torch.device("meta"):
        model = Tied()
    materialize(model, CPU)
    assert model.head.weight is model.embedding.weight
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["frozen.weight", "frozen.bias"]
    assert model.frozen.weight.abs().max() <= 8**-0.5  # nn.Linear's own initialisation
    assert model.frozen.weight.std() > 0


@pytest.mark.parametrize(
    ("requested", "sharded", "chosen", "reason"),
    [
        ("auto", False, "eager", "not sharded"),
        ("auto", True, "meta", "parameters are sharded"),
        ("eager", False, "eager", "as asked for"),
        ("eager", True, "eager", "as asked for"),
        ("meta", False, "meta", "as asked for"),
        ("meta", True, "meta", "as asked for"),
    ],
)
def test_choose_strategy(
    requested: str, sharded: bool, chosen: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="reference"):
        assert choose_strategy(requested, sharded) == chosen
    assert caplog.messages == [f"initialization: {chosen} ({reason})"]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Bare(), ["the module itself (Bare)"]),
        (nn.Sequential(nn.Linear(2, 2), Bare(), nn.Sequential(Bare())), ["1 (Bare)", "2.0 (Bare)"]),
    ],
)
def test_modules_that_cannot_be_initialised_are_named(model: nn.Module, names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="Add that method, or set initialization='eager'") as caught:
        require_reset_parameters(model)
    assert f"no way to initialise {', '.join(names)} after building on the meta device" in str(caught.value)


def test_meta_build_refuses_what_it_cannot_initialise() -> None:
    with pytest.raises(ConfigurationError, match=r"the module itself \(Bare\)"):
        build(Bare, "meta", CPU, sharded=True)
    assert torch.equal(build(Bare, "eager", CPU, sharded=True).get_parameter("scale"), torch.ones(3))
    require_reset_parameters(GPT(BUILDS["llama"]))


@pytest.mark.parametrize("stable", [False, True], ids=["plain", "StableEmbedding"])
def test_materialised_module_by_module_as_fsdp_does(stable: bool) -> None:
    config = GPTConfig.tiny(tie_embeddings=True)
    with torch.device("meta"):
        model = GPT(config, seed=3)
    if stable:
        swap_embeddings(model)
    for module in model.modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device="cpu", recurse=False)  # gives a tied tensor memory of its own under each name
            cast(Any, module).reset_parameters()
    assert model.head.weight is model.embedding.weight
    eager = GPT(config, seed=3).state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in eager.items())
