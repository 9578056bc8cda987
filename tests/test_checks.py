"""conformance.checks as a library: each rule passes what is right (its doctest) and names what is wrong."""

import doctest
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from conformance import Constant, Normal, Uniform, checks
from conformance.checks import initialization, precision
from conformance.clause import Violation

MODULES = [f"conformance.checks.{entry.name}" for entry in pkgutil.iter_modules(checks.__path__)]


def test_every_public_rule_has_an_example() -> None:
    for name in checks.__all__:
        assert ">>> " in (getattr(checks, name).__doc__ or ""), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_initialised_names_the_tensor() -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(Violation, match=r"in 1 of 2 tensors: weight \(1 of 6\)"):
        checks.initialised(model)


def test_decay_groups_cover_names_what_is_missing_and_what_is_foreign() -> None:
    model, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(3))
    with pytest.raises(Violation, match="missing: bias"):
        checks.decay_groups_cover(model, torch.optim.SGD([model.weight]))
    with pytest.raises(Violation, match=r"also there: a tensor \(3,\)"):
        checks.decay_groups_cover(model, torch.optim.SGD([*model.parameters(), other]))
    model.bias.requires_grad_(False)
    with pytest.raises(Violation, match=r"also there: a tensor \(2,\)"):
        checks.decay_groups_cover(model, torch.optim.SGD(model.parameters()))


def build(kind: type[Optimizer], keywords: dict[str, Any]) -> Optimizer:
    return kind([nn.Parameter(torch.zeros(2))], **keywords)


@pytest.mark.parametrize(
    ("builder", "seen"),
    [
        (lambda kind, keywords: build(kind, keywords | {"fused": True}), "unexpected keyword argument 'fused'"),
        (lambda kind, keywords: build(kind, {"lr": keywords["lr"]}), "weight_decay is"),
        (lambda kind, keywords: build(kind, keywords | {"lr": 1.0}), "lr is 1.0"),
        (
            lambda kind, keywords: build(
                kind, {k: v for k, v in keywords.items() if k[0] in "lwe" and k != "wieght_decay"}
            ),
            "without it",
        ),
    ],
    ids=["injects fused", "drops weight_decay", "changes lr", "swallows a misspelt keyword"],
)
def test_builders_that_are_wrong(builder: Any, seen: str) -> None:
    with pytest.raises(Violation, match=seen):
        checks.accepts_only_supported_keywords(builder)


def test_embedding_swaps_that_lose_something() -> None:
    table = nn.Embedding(8, 4, padding_idx=1)
    weight = table.weight.detach()
    with pytest.raises(Violation, match="seen: another"):
        checks.embedding_swap_lossless(table, nn.Embedding(8, 4, padding_idx=1, _weight=weight + 1))
    with pytest.raises(Violation, match="after the swap: padding_idx=None"):
        checks.embedding_swap_lossless(table, nn.Embedding(8, 4, _weight=weight.clone()))
    with pytest.raises(Violation, match="bfloat16"):
        checks.embedding_swap_lossless(table, nn.Embedding(8, 4, padding_idx=1, _weight=weight.bfloat16()))


def test_losses_in_bfloat16_are_seen_by_dtype_and_by_value() -> None:
    logits, targets = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0)), torch.arange(16).view(2, 8)
    coarse = F.cross_entropy(logits.bfloat16().flatten(0, 1), targets.flatten())
    with pytest.raises(Violation, match=r"seen: torch.bfloat16"):
        checks.loss_in_float32(logits, targets, coarse)
    with pytest.raises(Violation, match="relative bound 1e-05"):
        checks.loss_in_float32(logits, targets, coarse.float())
    exact = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    checks.loss_in_float32(logits, targets, exact)
    with pytest.raises(Violation, match="the loss"):
        checks.loss_in_float32(logits, targets, exact * 16 / 17)


def test_a_factor_that_losses_share_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 2, 8, 50, generator=generator), torch.arange(64).remainder(50).view(4, 2, 8)
    losses = [F.cross_entropy(x.flatten(0, 1), t.flatten()) for x, t in zip(logits, targets, strict=True)]
    for factor in (1.0, 16 / 17, 2.0**16):
        pairs = [(x, t, loss * factor) for x, t, loss in zip(logits, targets, losses, strict=True)]
        assert precision.shared_factor(pairs) == pytest.approx(factor, rel=1e-6)
    coarse = [(x, t, loss.bfloat16().float()) for x, t, loss in zip(logits, targets, losses, strict=True)]
    assert precision.shared_factor(coarse) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_healthy_draws_are_rarely_suspects(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4096, generator=generator) * 0.02
    uniform = torch.rand(4096, generator=generator) * 2 - 1
    # Three standard errors, three statistics: one draw in a hundred may be a suspect. None of these twenty is.
    assert not initialization.deviation(normal, Normal(0.0, 0.02))
    assert not initialization.deviation(uniform, Uniform(-1.0, 1.0))
    assert initialization.deviation(normal, Normal(0.0, 0.022)).startswith("std")
    assert initialization.deviation(normal + 0.004, Normal(0.0, 0.02)).startswith("mean")
    assert initialization.deviation(uniform / 3**0.5, Normal(0.0, 1 / 3)).startswith(("kurtosis", "std"))
    assert initialization.deviation(normal, Constant(0.0)) == "4096 of 4096 elements are not 0"
