"""Runs that torch.compile really compiles (conformance.recording.compiled), and the rule that judges them."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from conformance.checks.precision import moved_alike
from conformance.errors import Violation
from conformance.recipe import Recipe
from conformance.recording import record
from conformance.recording.compiled import compiling
from conformance.runs import Runs
from conformance.subjects.reference import Reference


def branch(x: torch.Tensor) -> torch.Tensor:
    """Return another value in compiled code than in plain code."""
    return x + 1 if torch.compiler.is_compiling() else x


def test_the_default_backend_compiles_there_and_nowhere_else() -> None:
    compiled, start = torch.compile(branch), torch.zeros(2)
    wrapper: Any = torch._TorchCompileInductorWrapper
    before = wrapper.__call__
    with compiling():
        assert compiled(start).tolist() == [1, 1]
    assert wrapper.__call__ is before
    with record():
        assert compiled(start).tolist() == [0, 0]


def test_it_is_put_back_after_an_error() -> None:
    wrapper: Any = torch._TorchCompileInductorWrapper
    before = wrapper.__call__
    with pytest.raises(RuntimeError, match="a run that fails"), compiling():
        raise RuntimeError("a run that fails")
    assert wrapper.__call__ is before


class Warner(Reference):
    """A stack that warns while it trains."""

    def train(self, recipe: Recipe) -> None:
        warnings.warn("as TorchDynamo may", stacklevel=1)
        (recipe.directory / "weights.pt").write_bytes(b"of a run that was compiled")


def test_a_warning_is_a_message_and_no_error() -> None:
    """Pytest makes errors of warnings, here and in many a project."""
    with Runs(Warner()) as runs:
        run = runs.compiled(Recipe(updates=2))
    assert run.messages == ["as TorchDynamo may"]
    assert run.checkpoint(2) is not None


def states(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Return the weights of a linear layer before and after it moved by one."""
    torch.manual_seed(seed)
    start = nn.Linear(3, 2).state_dict()
    return [start, {name: tensor + 1 for name, tensor in start.items()}]


def test_a_tensor_that_compiled_code_leaves_behind_is_named() -> None:
    start, end = states()
    moved_alike(start, end, {name: tensor * (1 + 1e-6) for name, tensor in end.items()})
    with pytest.raises(Violation, match=r"bias is off by 100.0% of its movement; 1 of 2 tensors are off"):
        moved_alike(start, end, end | {"bias": start["bias"]})
    with pytest.raises(Violation, match="weight is off by nan"):
        moved_alike(start, end, end | {"weight": end["weight"] * torch.nan})
    with pytest.raises(Violation, match="only in one of them: bias"):
        moved_alike(start, end, {"weight": end["weight"]})


def test_a_tensor_whose_gradient_is_rounding_is_measured_by_the_others() -> None:
    start, end = states()
    end["bias"] = start["bias"] + 1e-6
    moved_alike(start, end, end | {"bias": start["bias"] - 1e-6})
