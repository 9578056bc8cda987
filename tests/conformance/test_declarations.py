"""What an adapter declares decides what is asked, never what comes out: it cannot call off a clause that would fail."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from conformance.clause import Clause, catalogue
from conformance.errors import NotApplicable, Violation
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.session import Result, Session
from conformance.subjects.reference import Reference, ReferencePolicy
from reference import GPTConfig

SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")


def judged(subject: Any, identity: str) -> Result:
    with Session(subject) as session:
        return session.judge(catalogue()[identity])


def declaring(method: str, answer: Callable[..., Any]) -> Reference:
    """The reference, whose policy answers one question by itself."""

    def own(*_: Any, **__: Any) -> Any:
        return answer()

    policy = type("Policy", (ReferencePolicy,), {"rate": None, method: own})()  # without rate(), which is optional
    return type("Own", (Reference,), {"policy": policy})()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_rate_that_is_no_number_is_the_adapters_error(number: float) -> None:
    result = judged(declaring("learning_rate", lambda: number), "LR-1")
    assert (result.outcome, result.reason) == (
        "error",
        f"policy.learning_rate() returned {number} for update 1: it must return a finite number",
    )


def test_a_policy_cannot_call_off_a_clause() -> None:
    def refuse() -> None:
        raise NotApplicable("I do not say")

    result = judged(declaring("learning_rate", refuse), "LR-1")
    assert result.outcome == "error"
    assert result.reason.startswith("the policy raised NotApplicable: I do not say")


class Grows(Reference):
    """Lacks more and more, the longer it is judged."""

    lacks: Any = {}

    def train(self, recipe: Recipe) -> None:
        type(self).lacks["clip"] = "it has been lost meanwhile"
        super().train(recipe)


def test_what_a_stack_lacks_is_what_it_lacked_before_its_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(runs: Runs) -> None:
        runs.trace(Recipe())
        raise Violation("4", "5")

    monkeypatch.setattr(Grows, "lacks", dict(Reference.lacks))
    clause = Clause("CLIP-999", "It is right.", "why", "mend", "source", "bound", "must", "0.1", ("clip",), (), breaks)
    with Session(Grows()) as session:
        assert [session.judge(clause).outcome for _ in range(2)] == ["fail", "fail"]
    assert "clip" in Grows.lacks, "it did not grow"


class GivesUp(Reference):
    """Says that a recipe does not apply, when it has trained by it already."""

    def train(self, recipe: Recipe) -> None:
        super().train(recipe)
        raise NotApplicable("it did not go well")


def test_a_run_cannot_be_called_off_at_its_end() -> None:
    result = judged(GivesUp(), "DECAY-1")
    assert result.outcome == "error"
    assert "train() raised NotApplicable after" in result.reason


def test_an_adapter_that_does_not_know_a_field_is_not_judged_by_it() -> None:
    class Older(Reference):
        def model_config(self, recipe: Recipe) -> GPTConfig:
            sizes = {name: getattr(recipe, name) for name in SIZES}
            return GPTConfig.gpt2(**sizes, tie_embeddings=False)

    result = judged(Older(), "PREC-11")
    assert (result.outcome, result.reason) == (
        "n/a",
        "the adapter does not read Recipe.residual: map it, or name residual-opt-out in lacks, with a reason",
    )
