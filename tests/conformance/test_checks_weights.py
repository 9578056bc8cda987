"""Rules of what moves weights, and of what 16 bits leave of them: each names what is wrong, and nothing healthy."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.checks.optimizer import keeps_learning, moves_no_more_than, stays
from conformance.checks.precision import gradients_not_rounded, holds_only, not_rounded, starts_not_rounded
from conformance.clause import Violation, catalogue
from conformance.recipe import Recipe
from conformance.recording.trace import Checkpoint, Named, Update
from conformance.session import Result, Session
from conformance.subjects.reference import Reference
from conformance.suites.test_model import agree_up_to_a_factor

SOME, NONE = torch.ones(3), torch.zeros(3)
NOISE = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def judged(subject: Any, identity: str) -> Result:
    with Session(subject) as session:
        return session.judge(catalogue()[identity])


def update(before: Tensor, after: Tensor) -> Update:
    return Update((), Named(), Named({"weight": before}), Named({"weight": after}), {}, {})


def test_a_tensor_without_a_gradient_for_good_is_named() -> None:
    given = [{"bias": SOME, "expert": SOME}, {"bias": SOME, "expert": NONE}, {"bias": SOME, "expert": SOME}]
    keeps_learning(given)  # an expert may have no token for a while
    keeps_learning([*given, {"bias": SOME, "expert": None}])  # and one update alone says nothing
    with pytest.raises(Violation, match="1 of 2 have none after update 3, and move no more: expert"):
        keeps_learning([*given, {"bias": SOME, "expert": None}, {"bias": SOME, "expert": NONE}])


def test_what_moves_between_updates_in_one_run_only_is_named() -> None:
    moving = [update(NOISE, NOISE + 1), update(NOISE + 2, NOISE + 3)]
    still = [update(NOISE, NOISE + 1), update(NOISE + 1, NOISE + 2)]
    moves_no_more_than(moving, moving, {}, "tied weights")  # as a stack does that normalises its weights
    moves_no_more_than(moving, still, {}, "tied weights")
    with pytest.raises(Violation, match="something else changes weight; in the plain run it does not"):
        moves_no_more_than(still, moving, {"weight": ("weight", "head.weight")}, "tied weights")


def test_weights_that_no_step_moves_must_stay_up_to_rounding() -> None:
    stays([update(NOISE, NOISE), update(NOISE * (1 + 1e-7), NOISE)])
    stays([update(NONE, NONE + 1e-32), update(NONE + 1e-32, NONE)])  # by the rate that moves none
    with pytest.raises(Violation, match=r"1 of 1 tensors move: weight; weight by 0\.0001"):
        stays([update(NOISE, NOISE), update(NOISE * (1 - 1e-4), NOISE)])


def test_rounded_tensors_are_told_from_those_with_few_values() -> None:
    assert holds_only(NOISE.bfloat16().float(), torch.bfloat16)
    assert holds_only(NOISE.half().float(), torch.float16)
    assert not holds_only(NOISE, torch.bfloat16)
    assert not holds_only(NOISE.bfloat16(), torch.bfloat16), "its dtype says so already"
    assert not holds_only(torch.ones(8, 16), torch.bfloat16)


def test_weights_that_start_rounded_where_those_of_a_float32_run_do_not_are_named() -> None:
    coarse = NOISE.bfloat16().float()
    starts_not_rounded({"weight": coarse}, {"weight": coarse}, torch.bfloat16)  # drawn so in every precision
    with pytest.raises(Violation, match="1 of 1 tensors start with bfloat16 numbers alone: weight"):
        starts_not_rounded({"weight": NOISE}, {"weight": coarse}, torch.bfloat16)


def test_weights_rounded_to_float16_are_seen_too() -> None:
    later = {"weight": (NOISE + 1).half().float()}
    not_rounded({"weight": NOISE}, {"weight": NOISE + 1}, later, "before update 2")
    with pytest.raises(Violation, match="1 of 1 tensors hold float16 numbers alone: weight"):
        not_rounded({"weight": NOISE}, {"weight": NOISE + 1}, later, "before update 2", torch.float16)


def test_gradients_of_several_microbatches_are_no_16_bit_numbers() -> None:
    parts = [part.bfloat16().float() for part in (NOISE, NOISE.flip(0), NOISE.flip(1))]
    gradients_not_rounded({"weight": sum(parts, torch.zeros(8, 16)), "bias": None}, torch.bfloat16)
    with pytest.raises(Violation, match="the gradients of 1 of 1 tensors hold bfloat16 numbers alone: weight"):
        gradients_not_rounded({"weight": parts[0], "bias": None}, torch.bfloat16)


def test_one_factor_for_all_gradients_is_no_other_gradient() -> None:
    slopes = {"one": NOISE, "other": NOISE.flip(0), "unused": None}
    agree_up_to_a_factor(slopes, {"one": 3 * NOISE, "other": 3 * NOISE.flip(0), "unused": None}, "gpt", 0)
    third = {"third": NOISE.flip(1)}
    halved = {"one": 0.5 * NOISE, "other": NOISE.flip(0), "unused": None, **third}
    with pytest.raises(Violation, match="most of it in one"):
        agree_up_to_a_factor(slopes | third, halved, "gpt", -1)


class Sums(nn.Module):
    """Without a norm in front of its linear layer, and with a table whose values have 16 bits, as some are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(128, 32), nn.Linear(32, 32), nn.Linear(32, 128)
        self.embedding.weight.data = self.embedding.weight.data.bfloat16().float()

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.embedding(ids)))
        return logits


def test_a_linear_layer_behind_a_table_of_16_bit_numbers_is_not_accused() -> None:
    class Plain(Reference):
        def model_config(self, recipe: Recipe) -> Any:
            return Sums

    assert judged(Plain(), "PREC-8").outcome == "pass"


def test_dropout_at_one_place_that_fails_is_an_error() -> None:
    class Breaks(Reference):
        def train(self, recipe: Recipe) -> None:
            if recipe.dropping == "at one place":
                raise ValueError("no such place")
            super().train(recipe)

    result = judged(Breaks(), "DROP-3")
    assert result.outcome == "error"
    assert "no such place" in result.reason


@pytest.mark.parametrize(("identity", "field"), [("MODEL-4", "rotary_base"), ("MODEL-5", "norm_eps")])
def test_a_setting_of_the_model_that_the_adapter_does_not_read_is_not_judged(identity: str, field: str) -> None:
    class Older(Reference):
        def model_config(self, recipe: Recipe) -> Any:
            known = replace(Recipe(), shape=recipe.shape)
            return super().model_config(known)

    result = judged(Older(), identity)
    assert result.outcome == "n/a"
    assert f"the adapter does not read Recipe.{field}" in result.reason


def test_a_stack_that_serves_an_average_of_its_weights_is_not_accused() -> None:
    class Averages(Reference):
        def load(self, checkpoint: Checkpoint) -> nn.Module:
            module = super().load(checkpoint)
            for parameter in module.parameters():
                parameter.data.mul_(0.5)
            return module

    for identity in ("PREC-13", "TIE-8"):
        result = judged(Averages(), identity)
        assert (result.outcome, result.reason[:30]) == ("n/a", "load() gives other weights tha")
