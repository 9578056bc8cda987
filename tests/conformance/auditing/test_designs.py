"""Designs that look like faults and are none: the audit advises, or says why it did not look."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from conformance.auditing.facts import Backward, Facts, Said
from conformance.auditing.judging import judge
from conformance.auditing.rule import RULES, Seen
from conformance.auditing.rules.loss import is_multiple
from conformance.checks.reports import training_losses
from conformance.recording.trace import Forward, Named
from tests.conformance.auditing.made_up import (
    SHAPES,
    UPDATES,
    healthy,
    mean_loss,
    measures,
    set_all,
    set_info,
    set_targets,
    set_update,
    step,
)


def said(rule: str, change: Callable[[Facts], None]) -> tuple[str, str]:
    """Return the outcome and the words of a rule about a healthy run that was changed."""
    facts = healthy()
    change(facts)
    found = judge(RULES[rule], Seen(facts, [facts]))
    return found.outcome, f"{found.seen} {found.reason}"


def both(*changes: Callable[[Facts], None]) -> Callable[[Facts], None]:
    """Return a change that makes all of these."""

    def change(facts: Facts) -> None:
        for one in changes:
            one(facts)

    return change


def looks_ahead(facts: Facts) -> None:
    facts.probed = replace(facts.probed, looks_ahead=0)


def no_entropies(facts: Facts) -> None:
    facts.trace.entropies, facts.given = [], []


def one_batch(facts: Facts) -> None:
    ids = facts.trace.forwards[0].ids
    facts.trace.forwards = [Forward(**{**vars(f), "ids": ids}) for f in facts.trace.forwards]


def fills_gaps(facts: Facts) -> None:
    looks_ahead(facts)
    set_targets(facts, grad=True, shift=0)


def test_a_model_that_does_not_predict_the_next_token_may_look_ahead() -> None:
    outcome, words = said("looks-ahead", fills_gaps)
    assert outcome == "not looked at"
    assert "may look ahead" in words


def test_it_is_advice_where_the_targets_were_not_seen() -> None:
    outcome, words = said("looks-ahead", both(looks_ahead, no_entropies))
    assert outcome == "advice"
    assert "it was not seen whether" in words


@pytest.mark.parametrize("rule", ["same-batch", "repeats"])
def test_batches_repeat_on_purpose_where_no_cross_entropy_is_trained(rule: str) -> None:
    assert said(rule, one_batch)[0] == "fault"
    assert said(rule, both(one_batch, no_entropies))[0] == "advice"
    assert "--allow" in RULES[rule].mend


def test_a_forward_without_a_loss_is_no_evaluation() -> None:
    def policy_before_its_update(facts: Facts) -> None:
        facts.trace.forwards[-1] = Forward(**{**vars(facts.trace.forwards[-1]), "ids": facts.trace.forwards[0].ids})
        facts.trace.entropies = [entropy for entropy in facts.trace.entropies if entropy.grad_enabled]

    assert said("evaluated-and-trained", policy_before_its_update)[0] == "not looked at"


def test_a_new_optimizer_takes_over_tensors_and_thaws_others() -> None:
    def thaws(facts: Facts) -> None:
        set_info(facts, "h.0.weight", trainable=False)
        for number in range(UPDATES):
            set_update(facts, number, steps=(replace(step(), number=number // 2),))

    for rule in ("in-two-groups", "frozen-in-optimizer", "closed-form"):
        assert said(rule, thaws)[0] == "ok", rule
    both = (step(("wte.weight",)), replace(step(), number=1))
    assert said("in-two-groups", lambda facts: set_all(facts, steps=both))[0] == "fault"


def test_a_gradient_that_no_backward_adds_to_may_wait() -> None:
    def of_another_model(facts: Facts) -> None:
        waiting = torch.tensor(3.0)
        facts.leftovers[2] = {"wte.weight": waiting}
        facts.backwards = [
            Backward(b.update, b.losses, Named({**b.norms, "wte.weight": waiting})) if b.update == 2 else b
            for b in facts.backwards
        ]

    assert said("leftover-gradient", of_another_model)[0] == "ok"


def test_an_expert_may_get_no_token_but_a_block_must() -> None:
    def renamed(kind: str) -> Callable[[Facts], None]:
        def change(facts: Facts) -> None:
            idle, busy = f"h.{kind}.0.weight", f"h.{kind}.1.weight"
            set_all(facts, steps=(step((*SHAPES, idle)),))
            facts.trace.tensors = Named({**facts.trace.tensors, idle: facts.trace.tensors["h.0.weight"]})
            facts.backwards[0].norms[busy] = torch.tensor(1.0)

        return change

    assert said("no-gradient", renamed("experts"))[0] == "advice"
    assert said("no-gradient", renamed("mlp"))[0] == "fault"


def test_sam_runs_a_batch_twice_and_keeps_the_second_gradient() -> None:
    def sharpness_aware(facts: Facts) -> None:
        facts.trace.forwards = [
            Forward(**{**vars(f), "ids": facts.trace.forwards[n - n % 2].ids}) if n < 2 * UPDATES else f
            for n, f in enumerate(facts.trace.forwards)
        ]
        facts.noticed.cleared = [(number, "wte.weight") for number in range(UPDATES)]
        parts = [b.losses[0].item() for b in facts.backwards]
        facts.said = [Said(number + 1, f"loss {parts[2 * number]:.5f}") for number in range(UPDATES)]

    for rule in ("microbatch-lost", "loss-scale"):
        outcome, words = said(rule, sharpness_aware)
        assert outcome == "not looked at"
        assert "SAM" in words
    assert said("repeats", sharpness_aware)[0] == "ok"
    assert said("told-loss", sharpness_aware)[0] == "ok"


@pytest.mark.parametrize("rule", ["microbatch-lost", "loss-scale", "clipping"])
def test_a_gradient_made_by_hand_is_not_that_of_the_last_pass(rule: str) -> None:
    def per_sample(facts: Facts) -> None:
        facts.noticed.cleared = [(number, "wte.weight") for number in range(UPDATES)]
        facts.clips = [replace(clip, backwards=n) for clip in facts.clips for n in (1, 2)]
        for number in range(UPDATES):
            given = {
                n: g * (1 + k) for k, (n, g) in enumerate(facts.updates[number].gradients.items()) if g is not None
            }
            set_update(facts, number, measured_gradients=measures(given))

    outcome, words = said(rule, per_sample)
    assert outcome == "not looked at"
    assert "clipping per sample" in words


def test_microbatches_that_are_cleared_are_lost() -> None:
    def cleared(facts: Facts) -> None:
        facts.noticed.cleared = [(number, "wte.weight") for number in range(UPDATES)]

    assert said("microbatch-lost", cleared)[0] == "fault"


def test_a_gradient_of_torch_func_comes_without_a_backward() -> None:
    def transformed(facts: Facts) -> None:
        for number in range(1, UPDATES):
            set_update(facts, number, unfounded=True)

    def stepped_again(facts: Facts) -> None:
        first = facts.updates[1]
        set_update(facts, 2, unfounded=True, measured_gradients=first.measured_gradients)

    assert said("steps-again", transformed)[0] == "ok"
    assert said("steps-again", stepped_again)[0] == "fault"


def test_the_targets_of_a_decoder_are_its_own() -> None:
    def translates(facts: Facts) -> None:
        draw = torch.Generator().manual_seed(4)
        own = [torch.randint(64, (*f.ids.shape,), generator=draw) for f in facts.trace.forwards]
        facts.noticed.second_ids = [facts.trace.forwards[0].ids]
        facts.trace.forwards = [
            Forward(**{**vars(f), "ids": i}) for f, i in zip(facts.trace.forwards, own, strict=True)
        ]

    outcome, words = said("own-targets", translates)
    assert outcome == "not looked at"
    assert "decoder" in words


def test_masked_tokens_are_not_in_the_sequence() -> None:
    def masked(facts: Facts) -> None:
        draw = torch.Generator().manual_seed(6)
        for number, entropy in enumerate(facts.trace.entropies):
            forward = facts.trace.forwards[number]
            hidden = torch.rand(forward.ids.shape, generator=draw) < 0.5
            facts.trace.forwards[number] = replace(forward, ids=forward.ids.masked_fill(hidden, 63))
            facts.trace.entropies[number] = replace(
                entropy, targets=(1 + 2 * forward.ids.flip(0) % 61).masked_fill(~hidden, -100).flatten()
            )

    outcome, words = said("own-targets", masked)
    assert outcome == "not looked at"
    assert "fills gaps" in words


def test_several_heads_have_losses_of_their_own() -> None:
    def predicts_several(facts: Facts) -> None:
        entropies = [e for e in facts.trace.entropies if e.grad_enabled]
        ids = [forward.ids for forward in facts.trace.forwards]
        later = [replace(e, targets=i.roll(-2, 1).flatten()) for e, i in zip(entropies, ids, strict=False)]
        facts.trace.entropies = [each for pair in zip(entropies, later, strict=True) for each in pair]
        facts.given = [given for given in facts.given for _ in range(2)][: len(facts.trace.entropies)]

    for rule in ("shift", "own-targets"):
        assert said(rule, predicts_several)[0] == "ok", rule


def test_a_sum_of_several_losses_may_be_told() -> None:
    def told(factor: float) -> Callable[[Facts], None]:
        def change(facts: Facts) -> None:
            for backward in facts.backwards:
                backward.losses = [loss * factor for loss in backward.losses]
            facts.said = [
                Said(number + 1, f"loss {factor * mean_loss(facts, number):.5f}") for number in range(UPDATES)
            ]

        return change

    assert said("told-loss", told(0.613))[0] == "ok"
    assert said("told-loss", told(3.0))[0] == "fault"
    assert is_multiple(1024 * 4.1, 4.1)
    assert not is_multiple(0.613, 1.0)


def test_parts_of_a_loss_are_not_the_loss_of_training() -> None:
    assert training_losses(["policy_loss 0.0815 value_loss 25.79 d_loss 1.3", "kl loss 0.2000"]) == []
    assert training_losses(["train loss 3.1250"]) == ["3.1250"]
