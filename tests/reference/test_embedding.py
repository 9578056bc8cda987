"""nn.Embedding -> StableEmbedding -> nn.Embedding: the same tensors on the way in, the same output on the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.config import GPTConfig, TrainConfig
from reference.errors import ConfigurationError
from reference.model.embedding import (
    folded,
    is_stable,
    restore_embeddings,
    stable_embedding,
    swap_embeddings,
)
from reference.model.gpt import GPT
from reference.model.initialization import materialize
from reference.optimizers import find_class
from reference.training.setup import wants_stable_embedding

TINY: dict[str, Any] = {"vocab_size": 16, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
IDS = torch.arange(16).view(2, 8)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What Fabric's ``-true`` precisions do around forward; StableEmbedding computes in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def table(**options: Any) -> nn.Embedding:
    """An embedding with rows of very different lengths."""
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 16).view(-1, 1)
    return nn.Embedding(16, 8, _weight=weight, **options)


def norm_of(embedding: nn.Module) -> nn.LayerNorm:
    norm = embedding.norm
    assert isinstance(norm, nn.LayerNorm)
    return norm


def trained(embedding: nn.Embedding) -> nn.Embedding:
    """With a norm that is no longer the identity's gain and bias."""
    norm, generator = norm_of(embedding), torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.5 * torch.randn(8, generator=generator))
        norm.bias.copy_(0.5 * torch.randn(8, generator=generator))
    return embedding


class Shared(nn.Module):
    """One embedding module under two names, as encoder and decoder of a T5 share it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = table()
        self.decoder = nn.ModuleDict({"tokens": self.shared})

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.shared(ids) + self.decoder["tokens"](ids)
        return result


def test_swap_keeps_the_parameter_objects_and_their_values() -> None:
    model = GPT(GPTConfig.gpt2(**TINY))
    assert model.position is not None
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert swap_embeddings(model) == ["embedding", "position"]
    assert is_stable(model.embedding)
    assert is_stable(model.position)
    after = dict(model.named_parameters())
    for name, (parameter, values) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values)
    assert model.head.weight is model.embedding.weight
    assert set(after) - set(before) == {f"{e}.norm.{p}" for e in ("embedding", "position") for p in ("weight", "bias")}


def test_swapped_lookup_is_normed() -> None:
    stable = trained(stable_embedding(table()))
    rows = table().weight
    expected = nn.functional.layer_norm(rows, (8,), norm_of(stable).weight, norm_of(stable).bias)
    torch.testing.assert_close(stable(IDS), expected.view(2, 8, 8), rtol=0, atol=1e-6)


def test_swap_keeps_options_and_mode() -> None:
    options = {"padding_idx": 3, "max_norm": 1.5, "norm_type": 1.0, "scale_grad_by_freq": True}
    plain = table(**options).eval()
    stable = stable_embedding(plain)
    assert {name: getattr(stable, name) for name in options} == options
    assert (stable.num_embeddings, stable.embedding_dim, stable.sparse) == (16, 8, False)
    assert torch.equal(norm_of(stable).weight, torch.ones(8))
    assert torch.equal(norm_of(stable).bias, torch.zeros(8))
    assert not stable.training
    assert not norm_of(stable).training
    assert stable_embedding(table()).training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_dtype_and_requires_grad_are_kept_both_ways(dtype: torch.dtype, trainable: bool) -> None:
    plain = table().to(dtype).requires_grad_(trainable)
    model = nn.Sequential(plain)
    swap_embeddings(model)
    weight = plain.weight
    stable = model[0]
    assert isinstance(stable, nn.Embedding)
    assert stable.weight is weight
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, trainable)}
    trained(stable)
    restored = restore_embeddings(model).get_submodule("0")
    assert type(restored) is nn.Embedding
    assert (restored.weight.dtype, restored.weight.requires_grad) == (dtype, trainable)
    with default_dtype(dtype):
        assert torch.equal(restored(IDS), stable(IDS))


def test_sparse_embeddings_are_refused_by_name_and_nothing_is_swapped() -> None:
    model = nn.ModuleDict({"first": table(), "inner": nn.ModuleDict({"second": table(sparse=True)})})
    sentence = "the embedding 'inner.second' has sparse=True, but no bitsandbytes optimizer takes sparse gradients: "
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        swap_embeddings(model)
    assert type(model["first"]) is nn.Embedding


def test_subclasses_of_embedding_are_left_alone() -> None:
    model = nn.Sequential(stable_embedding(table()))
    before = model[0]
    assert swap_embeddings(model) == []
    assert model[0] is before


def test_a_module_without_embeddings_comes_back_equal() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    assert swap_embeddings(model) == []
    restored = restore_embeddings(model)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restored(x), model.eval()(x))
    assert restored is not model
    assert restored.get_parameter("0.weight") is not model.get_parameter("0.weight")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_restored_model_gives_equal_logits(tied: bool, position: str) -> None:
    model = GPT(GPTConfig.gpt2(**TINY, position=position, tie_embeddings=tied, dropout=0.5))
    names = swap_embeddings(model)
    for name in names:
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        trained(embedding)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    restored = restore_embeddings(model)
    assert model.training
    assert not restored.training
    assert torch.equal(restored(IDS), model.eval()(IDS))
    assert isinstance(restored, GPT)
    assert type(restored.embedding) is nn.Embedding
    assert not any(is_stable(module) for module in restored.modules())
    # The head keeps the unfolded weight and is a tensor of its own, and the configuration says so.
    assert restored.head.weight is not restored.embedding.weight
    assert torch.equal(restored.head.weight, before["embedding.weight" if tied else "head.weight"])
    assert restored.config.tie_embeddings is False
    # The model in training is untouched.
    assert is_stable(model.embedding)
    assert model.config.tie_embeddings is tied
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    GPT(restored.config).load_state_dict(restored.state_dict())


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_is_folded(norm_type: float) -> None:
    stable = trained(stable_embedding(table(max_norm=0.75, norm_type=norm_type)))
    plain = folded(stable)  # before a lookup, which shortens the rows in place
    unlimited = folded(trained(stable_embedding(table())))
    expected = stable(IDS)
    assert plain.max_norm is None
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(folded(stable)(IDS), expected, rtol=0, atol=1e-6)
    # LayerNorm hides the length of long rows, and eps shows that of short ones: without max_norm it is another table.
    assert (unlimited(IDS) - expected).abs().max() > 1e-5


def test_folded_options() -> None:
    stable = stable_embedding(table(padding_idx=3, scale_grad_by_freq=True))
    plain = folded(stable)
    assert (plain.padding_idx, plain.scale_grad_by_freq, plain.sparse) == (3, True, False)
    assert torch.equal(plain(IDS), stable(IDS)), "the padding row is looked up like any other"


def test_a_module_under_two_names_is_swapped_under_both() -> None:
    model = Shared()
    swap_embeddings(model)
    assert is_stable(model.shared)
    assert model.decoder["tokens"] is model.shared
    assert torch.equal(restore_embeddings(model)(IDS), model(IDS))


def test_swap_on_the_meta_device_keeps_the_table_of_initial_weights() -> None:
    """Under FSDP the swap comes before the parameters are materialised through reset_parameters."""
    with torch.device("meta"):
        sharded = GPT(GPTConfig.gpt2(**TINY))
    eager = GPT(GPTConfig.gpt2(**TINY))
    for model in (sharded, eager):
        swap_embeddings(model)
    materialize(sharded, torch.device("cpu"))
    expected = dict(eager.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("requested", "path", "wanted"),
    [
        (True, "bitsandbytes.optim.AdamW8bit", True),
        (True, "torch.optim.AdamW", False),
        (False, "bitsandbytes.optim.AdamW8bit", False),
    ],
)
def test_embeddings_are_swapped_for_bitsandbytes_only(requested: bool, path: str, wanted: bool) -> None:
    config = TrainConfig(stable_embedding=requested)
    assert wants_stable_embedding(config, find_class(path)) is wanted


def test_a_table_that_is_read_elsewhere_is_no_silent_change_of_function() -> None:
    class TiedByFunction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    model = TiedByFunction()
    swap_embeddings(model)
    with pytest.raises(ConfigurationError, match="the model reads the embedding's table in another place too"):
        restore_embeddings(model)
    assert model.training
