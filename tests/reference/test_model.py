"""The model: shapes, causality, dropout, rotary tables, grouped-query attention, the cache, and what it refuses."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.config import GPTConfig, TrainConfig
from reference.errors import ConfigurationError
from reference.model.gpt import GPT, Attention, GeluMLP, Rotary, SwigluMLP

# Weights large enough that every token moves every later logit by much more than a rounding.
TINY: dict[str, Any] = {
    "vocab_size": 17,
    "block_size": 8,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 16,
    "init_std": 0.2,
    "norm_eps": 1e-3,
}
SHAPES = {
    "gpt2": GPTConfig.gpt2(**TINY),
    "gpt2-rotary": GPTConfig.gpt2(**TINY, position="rotary"),
    "gpt2-swiglu": GPTConfig.gpt2(**TINY, mlp="swiglu"),
    "gpt2-rmsnorm": GPTConfig.gpt2(**TINY, norm="rmsnorm"),
    "gpt2-no-bias": GPTConfig.gpt2(**TINY, bias=False),
    "gpt2-untied": GPTConfig.gpt2(**TINY, tie_embeddings=False),
    "gpt2-grouped": GPTConfig.gpt2(**TINY, n_kv_head=2),
    "llama": GPTConfig.llama(**TINY),
    "llama-multi-query": GPTConfig.llama(**TINY, n_kv_head=1),
    "llama-learned-tied": GPTConfig.llama(**TINY, position="learned", tie_embeddings=True),
    "llama-gelu-bias": GPTConfig.llama(**TINY, mlp="gelu", bias=True),
}


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randint(17, (rows, length), generator=torch.Generator().manual_seed(1))


def expected_parameters(config: GPTConfig) -> int:
    """The number of parameters, counted from the definition of the architecture."""
    width, hidden, bias = config.n_embd, config.hidden_size, int(config.bias)
    norm = width * (1 + (bias if config.norm == "layernorm" else 0))
    heads = (config.n_head + 2 * config.kv_heads) * config.head_size
    attention = (width + bias) * heads + (width + bias) * width
    mlp = (width + bias) * hidden * (2 if config.mlp == "swiglu" else 1) + (hidden + bias) * width
    tables = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    positions = config.block_size * width if config.position == "learned" else 0
    return tables + positions + config.n_layer * (attention + mlp + 2 * norm) + norm


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_shape(config: GPTConfig) -> None:
    model = GPT(config)
    logits = model(tokens(5))
    assert logits.shape == (2, 5, 17)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(config)
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("qkv.bias") for name in names) is config.bias
    assert "head.bias" not in names
    assert (model.head.weight is model.embedding.weight) is config.tie_embeddings
    assert (model.position is None) is (config.position == "rotary")
    assert (model.rotary is None) is (config.position == "learned")
    kind = SwigluMLP if config.mlp == "swiglu" else GeluMLP
    assert sum(isinstance(module, kind) for module in model.modules()) == config.n_layer
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-3] * (2 * config.n_layer + 1)


@pytest.mark.parametrize(("config", "count"), [(GPTConfig.gpt2(), 124_475_904), (GPTConfig.llama(), 1_340_704_768)])
def test_default_sizes(config: GPTConfig, count: int) -> None:
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == count == expected_parameters(config)


@pytest.mark.parametrize(
    ("changes", "hidden"),
    [
        ({"mlp": "gelu", "n_embd": 48}, 192),
        ({"mlp": "swiglu", "n_embd": 48}, 128),  # 8/3 of it is a multiple of 32 already
        ({"mlp": "swiglu", "n_embd": 60}, 160),
        ({"mlp": "swiglu", "n_embd": 2048}, 5472),
        ({"mlp": "swiglu", "n_embd": 48, "intermediate_size": 7}, 7),
    ],
)
def test_hidden_size(changes: dict[str, Any], hidden: int) -> None:
    assert GPTConfig(**{**TINY, **changes}).hidden_size == hidden


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_causality(config: GPTConfig) -> None:
    model = GPT(config).eval()
    ids = tokens(8, rows=1)
    before = model(ids)
    for changed in range(8):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 17
        after = model(other)
        assert torch.equal(after[:, :changed], before[:, :changed]), f"token {changed} changed an earlier logit"
        differs = (after != before).any(dim=-1)[0]
        assert differs[changed:].all(), f"token {changed} did not reach every later position"


def test_dropout_is_off_in_eval_mode_and_on_in_training() -> None:
    model, undropped = (GPT(GPTConfig.gpt2(**TINY, dropout=p)) for p in (0.5, 0.0))
    ids = tokens(8)
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(model.eval()(ids), undropped(ids))


@pytest.mark.parametrize("place", ["dropout", "blocks.0.dropout", "blocks.0.attention"])
def test_every_place_drops_in_training(place: str) -> None:
    model = GPT(GPTConfig.gpt2(**TINY))
    assert torch.equal(model(tokens(8)), model(tokens(8)))
    module = model.get_submodule(place)
    setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.5)
    assert not torch.equal(model(tokens(8)), model(tokens(8)))


def test_sequence_longer_than_block_size_is_refused() -> None:
    model = GPT(SHAPES["gpt2"])
    assert model(tokens(8)).shape == (2, 8, 17)
    sentence = "the sequence has 9 tokens, but block_size is 8: shorten it or build the model with a larger block_size."
    with pytest.raises(ValueError, match=re.escape(sentence)):
        model(tokens(9))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 8, (3, 1, 4)], ids=["one-by-one", "in-chunks"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_with_a_cache_are_those_without(config: GPTConfig, chunks: tuple[int, ...]) -> None:
    model = GPT(config).eval()
    ids = tokens(8)
    cache = model.new_cache()
    logits = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
    # 1.6e-6 at most over these shapes; a past that is masked, or a position off by one, gives 1e-1 and more
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1.6e-5)
    assert [kept.length for kept in cache] == [8, 8]
    assert cache[0].keys is not None
    assert cache[0].keys.shape == (2, config.kv_heads, 8, config.head_size)


@torch.no_grad()
def test_a_cache_that_is_full_is_refused() -> None:
    model = GPT(SHAPES["llama"])
    cache = model.new_cache()
    model(tokens(8), cache)
    with pytest.raises(ValueError, match=r"the sequence has 9 tokens, but block_size is 8: shorten it"):
        model(tokens(1), cache)
    small = model.new_cache(3)
    model(tokens(2), small)
    with pytest.raises(ValueError, match=r"4 tokens do not fit into a cache of 3: start with a new one\."):
        model(tokens(2), small)


@torch.no_grad()
def test_a_cache_takes_the_dtype_of_the_computation() -> None:
    model = GPT(SHAPES["llama"])
    cache = model.new_cache()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(4), cache)
    assert cache[0].values is not None
    assert cache[0].values.dtype == torch.bfloat16


def gradients(model: GPT, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The gradients of the logits' squares, with the dropout of one seed."""
    torch.manual_seed(3)
    forward(tokens(8)).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointed_blocks_give_the_same_gradients(name: str) -> None:
    model = GPT(replace(SHAPES[name], dropout=0.5))
    calls: list[int] = []
    model.blocks[1].get_submodule("mlp").register_forward_hook(lambda *_: calls.append(1))
    expected = gradients(model, model)
    assert len(expected) == len(list(model.parameters()))
    assert len(calls) == 1
    model.checkpoint_blocks = True
    assert all(map(torch.equal, gradients(model, model), expected))
    assert len(calls) == 3, "computed in forward, and again in backward"


def test_checkpointed_blocks_compile_into_one_graph() -> None:
    model = GPT(replace(SHAPES["gpt2"], dropout=0.5))
    expected = gradients(model, model)
    model.checkpoint_blocks = True
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for gradient, wanted in zip(gradients(model, compiled), expected, strict=True):
        # 0 as measured, of gradients up to 54; another dropout in backward gives more than 1
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


def test_checkpointed_blocks_in_eval_mode_are_computed_once() -> None:
    model = GPT(SHAPES["gpt2"]).eval()
    expected = model(tokens(8))
    model.checkpoint_blocks = True
    calls: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    logits = model(tokens(8))
    logits.sum().backward()
    assert torch.equal(logits, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model = GPT(SHAPES["gpt2"])
    assert torch.equal(model(tokens(8).to(dtype)), model(tokens(8)))


def test_rotary_tables_against_float64() -> None:
    length, size, theta = 4096, 8, 10000.0
    rotary = Rotary(length, size, theta)
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    phase = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
    # Rounding the exponent costs ln(theta) / 2 = 4.6 units of the phase's last place, power and product one each.
    bound = torch.finfo(torch.float32).eps * (8 * phase + 1)
    assert ((rotary.cos.double() - phase.cos()).abs() <= bound).all()
    assert ((rotary.sin.double() - phase.sin()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tables_of_a_narrow_build_are_the_rounded_float32_ones(dtype: torch.dtype) -> None:
    wide = Rotary(2048, 8, 10000.0)
    narrow = Rotary(2048, 8, 10000.0).to(dtype)
    narrow.reset_parameters()
    assert narrow.cos.dtype == dtype
    assert torch.equal(narrow.cos, wide.cos.to(dtype))
    assert torch.equal(narrow.sin, wide.sin.to(dtype))


def test_rotary_tables_are_not_in_the_checkpoint() -> None:
    assert not [key for key in GPT(SHAPES["llama"]).state_dict() if "rotary" in key]


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_grouped_query_attention_is_full_attention_with_repeated_heads(position: str) -> None:
    grouped = GPT(GPTConfig.gpt2(**TINY, position=position, n_kv_head=2)).double().eval()
    full = GPT(GPTConfig.gpt2(**TINY, position=position)).double().eval()
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if ".qkv." in name:
            q, k, v = tensor.split((4 * 4, 2 * 4, 2 * 4))
            k, v = (part.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v))
            weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens(8)), full(tokens(8)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_attention_is_its_formula(position: str) -> None:
    model = GPT(GPTConfig.gpt2(**TINY, position=position)).double()
    attention = model.blocks[0].get_submodule("attention")
    assert isinstance(attention, Attention)
    x = torch.randn(1, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.qkv(x)[0].unflatten(1, (3, 4, 4)).permute(1, 2, 0, 3)  # (H, T, D) each
    if position == "rotary":  # the two halves of a head are real and imaginary parts, turned by position
        turn = torch.polar(torch.ones(8, 2), torch.outer(torch.arange(8), torch.tensor([1.0, 0.01])))
        q, k = (torch.complex(*z.chunk(2, dim=-1)) * turn for z in (q, k))
        q, k = (torch.cat((z.real, z.imag), dim=-1) for z in (q, k))
    scores = (q @ k.mT / 4**0.5).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    expected = attention.proj((scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))
    tolerance = 1e-12 if position == "learned" else 1e-6  # the tables are float32
    torch.testing.assert_close(attention(x, model.rotary)[0], expected, rtol=0, atol=tolerance)


def test_mlps_are_their_formulas() -> None:
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    gelu, swiglu = (kind(SHAPES["gpt2"]).double() for kind in (GeluMLP, SwigluMLP))
    y, gate = gelu.get_submodule("fc")(x), swiglu.get_submodule("gate")(x)
    hidden = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(gelu(x), gelu.get_submodule("proj")(hidden), rtol=0, atol=1e-12)
    hidden = gate * gate.sigmoid() * swiglu.get_submodule("fc")(x)
    torch.testing.assert_close(swiglu(x), swiglu.get_submodule("proj")(hidden), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm": "rms"}, "norm is 'rms', but must be one of 'layernorm', 'rmsnorm'."),
        ({"position": "alibi"}, "position is 'alibi', but must be one of 'learned', 'rotary'."),
        ({"mlp": "relu"}, "mlp is 'relu', but must be one of 'gelu', 'swiglu'."),
        ({"n_layer": 0}, "n_layer is 0, but must be at least 1."),
        ({"vocab_size": -1}, "vocab_size is -1, but must be at least 1."),
        ({"n_kv_head": 0}, "n_kv_head is 0"),
        ({"n_kv_head": -1}, "n_kv_head is -1"),
        ({"n_head": 3}, "n_embd 16 is not divisible by n_head 3: choose a multiple of n_head as n_embd."),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3: every key/value head must serve the same"),
        ({"n_kv_head": 8}, "n_head 4 is not divisible by n_kv_head 8"),
        ({"position": "rotary", "n_head": 16}, "rotary positions turn pairs of channels, so n_embd / n_head must be"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be in [0, 1)."),
        ({"init_std": 0.0}, "init_std is 0.0, but must be positive."),
    ],
)
def test_a_shape_that_cannot_work_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        GPTConfig(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"updates": 0}, "updates is 0, but must be at least 1."),
        ({"precision": "bf16"}, "precision is 'bf16', but must be one of '32-true', 'bf16-mixed', "),
        ({"updates": "3"}, "updates is '3', but must be a whole number."),
        ({"updates": True}, "updates is True, but must be a whole number."),
        ({"optimizer": dict}, "optimizer is <class 'dict'>, but must be text."),
        ({"optimizer_args": 3}, "optimizer_args is 3, but must be a mapping, such as {lr: 3e-4}."),
        ({"cooldown": 1.5}, "cooldown is 1.5, but must be a whole number or null (None)."),
        ({"clip": float("nan")}, "clip is nan: give a positive norm, or None for no clipping."),
        ({"seed": 1 << 32}, "seed is 4294967296, but must lie between 0 and 2**32 - 1."),
        ({"capture_step": True}, "capture_step is True, but it was removed, because a captured step saved no time"),
        ({"decay": "none"}, "decay is 'none', but must be one of 'role', 'ndim', 'all'."),
        ({"save_every": 0}, "save_every is 0: give a number of at least 1, or None for never."),
        ({"updates": 3, "warmup": 4}, "warmup is 4, but must lie between 0 and updates (3)."),
        ({"clip": 0.0}, "clip is 0.0: give a positive norm, or None for no clipping."),
    ],
)
def test_training_that_cannot_work_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        TrainConfig(**changes)


@pytest.mark.parametrize(("fp32_residual", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_under_autocast(fp32_residual: bool, expected: torch.dtype) -> None:
    model = GPT(GPTConfig.tiny(fp32_residual=fp32_residual))
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    ids = torch.arange(8).view(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    assert seen == [expected] * 3
    assert torch.equal(model(ids), GPT(GPTConfig.tiny())(ids))  # nothing changes without autocast
