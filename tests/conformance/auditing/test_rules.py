"""Every rule of the audit, shown to accuse what is faulty and to leave alone what is healthy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from conformance.auditing.facts import Backward, Facts, Said
from conformance.auditing.judging import judge
from conformance.auditing.noticed import Load
from conformance.auditing.rule import RULES, Seen
from conformance.recording.trace import Loss, Measures, Named
from tests.conformance.auditing.made_up import (
    MICROBATCHES,
    SHAPES,
    UPDATES,
    V,
    healthy,
    mean_loss,
    measures,
    resumed,
    set_all,
    set_entropies,
    set_forwards,
    set_info,
    set_targets,
    set_update,
    step,
)

Change = Callable[[Facts], None]
ADAM = ("torch.optim.adam.Adam", "torch.optim.optimizer.Optimizer")


def nothing(facts: Facts) -> None:
    """Leave it."""


@dataclass(frozen=True)
class Case:
    """What spoils a healthy run for one rule. ``ready`` is done first, where the rule looks at nothing otherwise."""

    spoil: Change
    outcome: str = "fault"
    ready: Change = nothing
    ranks: int = 1
    make: Callable[[], Facts] | None = None
    expected: tuple[tuple[str, str], ...] = ()
    words: str = ""


def field(name: str, value: Any) -> Change:
    """Return a change of one field of the facts."""
    return lambda facts: setattr(facts, name, value)


def both(*changes: Change) -> Change:
    """Return a change that makes all of these."""

    def change(facts: Facts) -> None:
        for one in changes:
            one(facts)

    return change


def noticed(name: str, value: Any) -> Change:
    """Return a change of one field of what was noticed."""
    return lambda facts: setattr(facts.noticed, name, value)


def steps(*names: str, **settings: object) -> Change:
    """Return a change of all steps: other tensors, or other settings."""
    return lambda facts: set_all(facts, steps=(step(names or tuple(SHAPES), **settings),))  # type: ignore[arg-type] # any setting


def stepped_again(facts: Facts) -> None:
    """The third step finds the gradient of the second."""
    set_update(facts, 2, unfounded=True, measured_gradients=facts.updates[1].measured_gradients)


def never_pushed(name: str) -> Change:
    """Return a change that takes the gradient of a tensor from all backward passes."""

    def change(facts: Facts) -> None:
        for backward in facts.backwards:
            del backward.norms[name]

    return change


def without_gradient(facts: Facts) -> None:
    for number, update in enumerate(facts.updates):
        set_update(facts, number, gradients=Named({**update.gradients, "h.0.weight": None}))
    for backward in facts.backwards:
        backward.norms = Named({name: norm for name, norm in backward.norms.items() if name != "h.0.weight"})


def still(facts: Facts) -> None:
    begun = facts.updates[0].measured_before
    assert begun is not None
    for number, update in enumerate(facts.updates):
        assert update.measured_after is not None
        norms = Named({**update.measured_after.norms, "h.0.weight": begun.norms["h.0.weight"]})
        bits = Named({**update.measured_after.bits, "h.0.weight": begun.bits["h.0.weight"]})
        after = Named({**update.after, "h.0.weight": facts.updates[0].before["h.0.weight"]})
        set_update(facts, number, measured_after=Measures(norms, bits), after=after)


def weights_of_nan(facts: Facts) -> None:
    bad = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    set_update(facts, 3, measured_after=measures(bad))


def unwritten(facts: Facts) -> None:
    facts.trace.measured_initial = measures({n: torch.full(s, torch.nan) for n, s in SHAPES.items()})


def defaults(facts: Facts) -> None:
    torch.manual_seed(0)
    drawn = {n: torch.randn(s) if "wte" in n else torch.empty(s).uniform_(-0.5, 0.5) for n, s in SHAPES.items()}
    facts.trace.initial, facts.trace.measured_initial = Named(drawn), measures(drawn)
    set_entropies(facts, value=torch.tensor(9.0))


def coarse(facts: Facts) -> None:
    for name in SHAPES:
        set_info(facts, name, dtype=torch.bfloat16)


def losses_times(factor: float) -> Change:
    def change(facts: Facts) -> None:
        for backward in facts.backwards:
            backward.losses = [loss * factor for loss in backward.losses]

    return change


def ragged(alike: bool) -> Change:
    """Return a change to microbatches with different numbers of targets, each target with the same weight or not."""

    def change(facts: Facts) -> None:
        entropies = [e for e in facts.trace.entropies if e.grad_enabled]
        for number, entropy in enumerate(entropies):
            if number % 2:
                targets = entropy.targets.clone()
                targets[8:] = -100
                facts.trace.entropies[number] = replace(entropy, targets=targets)
        for number, backward in enumerate(facts.backwards):
            entropy = facts.trace.entropies[number]
            first = number - number % 2
            both = sum(e.counted for e in facts.trace.entropies[first : first + 2])
            share = entropy.counted / both if alike else 0.5
            backward.losses = [entropy.value * share]

    return change


def divided_by_count(more: int) -> Change:
    """Return a change to sums of losses that are divided by their targets, and by ``more`` for each sequence."""

    def change(facts: Facts) -> None:
        entropies = [entropy for entropy in facts.trace.entropies if entropy.grad_enabled]
        for number, (entropy, backward) in enumerate(zip(entropies, facts.backwards, strict=True)):
            summed = replace(entropy, reduction="sum", value=entropy.value * entropy.counted)
            facts.trace.entropies[number] = summed
            rows = sum(len(forward.ids) for forward in facts.trace.training_forwards(backward.update))
            targets = sum(other.counted for other in entropies if other.update == entropy.update)
            facts.backwards[number].losses = [summed.value / (targets + more * rows)]

    return change


def sums(facts: Facts) -> None:
    """Make the gradient of two processes their sum, and their losses whole means."""
    facts.wrappers = ()
    for number, update in enumerate(facts.updates):
        own = facts.backwards[MICROBATCHES * number + 1].norms
        assert update.measured_gradients is not None
        facts.clips[number] = replace(facts.clips[number], norm=2 * torch.stack(list(own.values())).norm())


def masked(first: int, last: int | None) -> Change:
    """Return a change that ignores the targets of a row from one place to another."""

    def change(facts: Facts) -> None:
        for number, (forward, entropy) in enumerate(zip(facts.trace.forwards, facts.trace.entropies, strict=True)):
            targets = entropy.targets.clone().view(len(forward.ids), -1)
            targets[:, first:last] = -100
            facts.trace.entropies[number] = replace(entropy, targets=targets.flatten())

    return change


def token_masked(facts: Facts) -> None:
    for number, (forward, entropy) in enumerate(zip(facts.trace.forwards, facts.trace.entropies, strict=True)):
        ids, targets = forward.ids.clone(), entropy.targets.clone().view(len(forward.ids), -1)
        ids[:, 6], targets[:, 5] = 7, -100
        targets[targets == 7] = -100
        facts.trace.forwards[number] = replace(forward, ids=ids)
        facts.trace.entropies[number] = replace(entropy, targets=targets.flatten())


def padded(masks: bool) -> Change:
    """Return a change to rows that end in padding of different length, with targets there or without."""

    def change(facts: Facts) -> None:
        for number, (forward, entropy) in enumerate(zip(facts.trace.forwards, facts.trace.entropies, strict=True)):
            ids, targets = forward.ids.clone(), entropy.targets.clone().view(len(forward.ids), -1)
            ids[ids == 0], targets[targets == 0] = 1, 1
            for row in range(len(ids)):
                ids[row, 8 - row :], targets[row, 7 - row :] = 0, -100 if masks else 0
                ids[row, 7 - row], targets[row, 6 - row] = 63, 63
            facts.trace.forwards[number] = replace(forward, ids=ids)
            facts.trace.entropies[number] = replace(entropy, targets=targets.flatten())

    return change


def unreduced(right: bool) -> Change:
    """Return a change to losses without reduction, with places that are ignored: a mean over targets, or over all."""

    def change(facts: Facts) -> None:
        for number, entropy in enumerate(facts.trace.entropies):
            targets = entropy.targets.clone()
            targets[: 6 + number] = -100
            value = torch.where(targets >= 0, entropy.value, torch.tensor(0.0))
            facts.trace.entropies[number] = new = replace(entropy, targets=targets, reduction="none", value=value)
            if number < len(facts.backwards):
                places = new.counted if right else targets.numel()
                facts.backwards[number].losses = [value.sum() / places / MICROBATCHES]

    return change


def replica_moves(facts: Facts) -> None:
    if facts.rank:
        set_update(facts, 1, measured_after=measures({name: torch.ones(shape) for name, shape in SHAPES.items()}))


def replica_moves_in_pairs(facts: Facts) -> None:
    """Change two elements alike: the digest of the tensor, an XOR, stays as it is."""
    if facts.rank:
        moved = {name: sample + 1 for name, sample in facts.updates[1].after.items()}
        set_update(facts, 1, after=Named(moved))


def own_factor(facts: Facts) -> None:
    if facts.rank:
        for number, update in enumerate(facts.updates):
            assert update.measured_gradients is not None
            norms = Named({name: 0.5 * norm for name, norm in update.measured_gradients.norms.items()})
            set_update(facts, number, measured_gradients=Measures(norms, Named()))


def fewer_targets(facts: Facts) -> None:
    if facts.rank:
        masked(4, None)(facts)


def same_batch(facts: Facts) -> None:
    set_forwards(facts, ids=facts.trace.forwards[0].ids)


def of_others(facts: Facts) -> None:
    for number, entropy in enumerate(facts.trace.entropies):
        targets = (entropy.targets + 17) % V
        facts.trace.entropies[number] = replace(entropy, targets=targets)


def probabilities(facts: Facts) -> None:
    facts.given = [g and replace(g, lowest=torch.tensor(0.0), sums=torch.ones(8)) for g in facts.given]


def nan_loss(facts: Facts) -> None:
    facts.backwards[2].losses = [torch.tensor(torch.nan)]


def last_one_trained(facts: Facts) -> None:
    first, held = facts.trace.forwards[0], facts.trace.forwards[-1]
    before = [replace(held, update=0), replace(held, update=0, ids=first.ids)]
    facts.trace.forwards = [*before, *facts.trace.forwards]


def told(text: str) -> Change:
    return lambda facts: facts.said.extend(Said(number, text.format(number)) for number in (1, 2, 3, 4))


def told_doubled(facts: Facts) -> None:
    facts.said = [Said(n + 1, f"loss {2 * mean_loss(facts, n):.5f}") for n in range(UPDATES)]


def told_mean(facts: Facts) -> None:
    both = healthy(0, 2), healthy(1, 2)
    means = [sum(mean_loss(own, number) for own in both) / 2 for number in range(UPDATES)]
    facts.said = [Said(number + 1, f"loss {mean:.5f}") for number, mean in enumerate(means)]


def told_alone(facts: Facts) -> None:
    facts.said = [Said(n + 1, f"loss {mean_loss(facts, n):.5f}") for n in range(UPDATES)]


def hardly_moves(facts: Facts) -> None:
    for number in (1, 2, 3):
        set_update(facts, number, after=facts.updates[number].before)


def ends_masked(facts: Facts) -> None:
    for number, entropy in enumerate(facts.trace.entropies):
        facts.trace.entropies[number] = replace(
            entropy, targets=entropy.targets.masked_fill(entropy.targets == 63, -100)
        )


def began_equal(facts: Facts) -> None:
    set_info(facts, "wte.weight", names=("wte.weight",))
    assert facts.trace.measured_initial is not None
    for kind in (facts.trace.measured_initial.bits, facts.trace.measured_initial.norms):
        kind["head.weight"] = kind["wte.weight"]


def held_twice(facts: Facts) -> None:
    facts.trace.forwards[2] = replace(facts.trace.forwards[2], ids=facts.trace.forwards[0].ids)


def of_tags(facts: Facts) -> None:
    of_others(facts)
    for number, entropy in enumerate(facts.trace.entropies):
        facts.trace.entropies[number] = replace(entropy, targets=entropy.targets % 3 + 60)


def not_saved(facts: Facts) -> None:
    no_moments(facts)
    facts.noticed.reads[0].moments = 0


def held_out_again(facts: Facts) -> None:
    facts.trace.forwards[-1] = replace(facts.trace.forwards[-1], ids=facts.trace.forwards[0].ids)


def more_backwards(facts: Facts) -> None:
    facts.backwards += [Backward(UPDATES, [torch.tensor(1.0)]) for _ in range(9)]


def no_moments(facts: Facts) -> None:
    set_update(facts, 0, state_before={})


def muon(*names: str) -> Change:
    both = (step(names, ("torch.optim.Muon",)), step(tuple(n for n in SHAPES if n not in names)))
    return lambda facts: set_all(facts, steps=both)


def muon_beside(**settings: object) -> Change:
    """One optimizer, whose name says Muon, of two groups: the second has the table."""
    inner = step(("h.0.weight",), ("nanochat.MuonAdamW",), momentum=0.95)
    outer = step(tuple(n for n in SHAPES if n != "h.0.weight"), ("nanochat.MuonAdamW",), **settings)  # type: ignore[arg-type] # of several types
    return lambda facts: set_all(facts, steps=(replace(inner, groups=(*inner.groups, *outer.groups)),))


def in_compiled_code(facts: Facts) -> None:
    """The cross entropies are not seen; each update has four microbatches, whose losses are divided by four."""
    facts.trace.entropies = []
    facts.backwards = [Backward(n, [torch.tensor((5.5 + 0.0001 * k) / 4)]) for n in range(UPDATES) for k in range(4)]
    facts.said = [Said(n + 1, "loss 5.50015") for n in range(UPDATES)]


def averaged(facts: Facts) -> None:
    facts.said = [Said(n + 1, "loss 5.5003") for n in range(UPDATES)]  # of the last microbatches


def clips(**changes: Any) -> Change:
    return lambda facts: setattr(facts, "clips", [replace(clip, **changes) for clip in facts.clips])


def clips_each(facts: Facts) -> None:
    facts.clips = [replace(clip, tensors=(name,)) for clip in facts.clips for name in [*SHAPES, *SHAPES]]


def limits(facts: Facts) -> None:
    for clip in facts.clips:
        assert clip.norm is not None
    clips(limit=0.5)(facts)


def autocast_backward(facts: Facts) -> None:
    facts.trace.losses = [Loss(loss.update, loss.value, autocast=True) for loss in facts.trace.losses]


def tied(facts: Facts) -> None:
    set_info(facts, "wte.weight", names=("wte.weight", "lm_head.weight"))
    facts.tied_at_end = {**facts.tied_at_end, "wte.weight": ("wte.weight", "lm_head.weight")}


def gone_before_step(facts: Facts) -> None:
    for number, update in enumerate(facts.updates):
        empty: Named[Any] = Named(dict.fromkeys(update.gradients))
        set_update(facts, number, gradients=empty, measured_after=update.measured_before)


CASES: dict[str, list[Case]] = {
    "uninitialised": [Case(unwritten)],
    "default-init": [Case(defaults, "advice")],
    "first-loss": [Case(lambda f: set_entropies(f, value=torch.tensor(9.0)), "advice")],
    "not-finite": [Case(weights_of_nan)],
    "never-moves": [Case(still), Case(still, "advice", ready=coarse)],
    "ties-apart": [
        Case(began_equal, "advice", ready=tied),
        Case(lambda f: setattr(f, "tied_at_end", {n: (n,) for n in SHAPES}), ready=tied),
    ],
    "sixteen-bit-weights": [Case(coarse, "advice")],
    "in-no-group": [
        Case(steps("wte.weight", "h.0.weight", "head.weight")),
        Case(steps("norm.weight"), "advice"),
        Case(steps("norm.weight"), ready=noticed("promised", ["h.0.weight"]), words="never stepped"),
    ],
    "in-two-groups": [Case(steps(*SHAPES, "wte.weight"))],
    "outside-the-model": [Case(steps(*SHAPES, "foreign-1"))],
    "frozen-in-optimizer": [
        Case(both(lambda f: set_info(f, "norm.weight", trainable=False), never_pushed("norm.weight")), "advice")
    ],
    "decay-of-vectors": [Case(steps(weight_decay=0.1), "advice")],
    "first-rate-0": [Case(steps(lr=0.0), "advice")],
    "not-fused": [Case(steps(fused=False), "advice", ready=both(field("device", "cuda"), steps(fused=True)))],
    "no-gradient": [Case(without_gradient), Case(gone_before_step, words="cleared before the step")],
    "leftover-gradient": [
        Case(lambda f: f.leftovers.update({2: {"wte.weight": torch.tensor(1.0)}})),
        Case(noticed("kept", {"wte.weight": torch.tensor(1.0)}), words="closure"),
    ],
    "microbatch-lost": [
        Case(noticed("cleared", [(1, "wte.weight")]), words="cleared between"),
        Case(lambda f: setattr(f.backwards[2], "norms", f.backwards[3].norms), words="left every gradient as it was"),
    ],
    "unregistered": [
        Case(field("unregistered", {"Linear.weight": "Linear"})),
        Case(field("foreign_leaves", [(4, 4)])),
    ],
    "loss-scale": [
        Case(losses_times(2.0), words="none is divided"),
        Case(losses_times(0.5), words="twice"),
        Case(losses_times(1024.0), words="unscaled"),
    ],
    "mean-of-means": [Case(ragged(alike=False), ready=ragged(alike=True))],
    "clipping": [
        Case(clips(backwards=0), words="before its first backward"),
        Case(clips(tensors=()), words="used up"),
        Case(clips_each, words="one tensor each"),
        Case(limits, words="the step finds"),
        Case(clips(tensors=("wte.weight", "head.weight")), "advice", words="left out"),
    ],
    "closed-form": [Case(lambda f: set_update(f, 2, after=f.updates[2].before))],
    "lost-to-rounding": [Case(hardly_moves, "advice", ready=coarse)],
    "steps-again": [Case(stepped_again)],
    "steps-stop": [Case(more_backwards)],
    "steps-of-schedule": [
        Case(noticed("scheduled", {1: 8}), "advice", ready=noticed("scheduled", {1: 4})),
        Case(noticed("scheduled", {1: 12}), ready=noticed("scheduled", {1: 3})),
    ],
    "told-rate": [
        Case(told("step {0} lr 0.{0}25")),
        Case(told("step {0} lr 0.{0}25"), "advice", ready=lambda f: set_update(f, 0, steps=(step(lr=0.25),))),
    ],
    "odd-settings": [
        Case(steps(betas=(0.99, 0.9)), "advice", ready=steps(betas=(0.9, 0.99))),
        Case(steps(optimizer=ADAM, weight_decay=0.1), "advice", ready=steps(optimizer=ADAM)),
    ],
    "muon-tensors": [
        Case(muon("h.0.weight", "wte.weight"), "advice", ready=muon("h.0.weight")),
        Case(muon_beside(momentum=0.95), "advice", ready=muon_beside(kind="adamw", betas=(0.8, 0.96))),
        Case(muon_beside(momentum=0.95), "advice", ready=muon_beside(betas=(0.8, 0.96))),
        Case(muon_beside(use_muon=True, betas=(0.8, 0.96)), "advice", ready=muon_beside(use_muon=False)),
    ],
    "autocast-too-wide": [Case(autocast_backward, "advice")],
    "recomputed-dropout": [Case(noticed("recomputed", [True, False]), ready=noticed("recomputed", [True, True]))],
    "same-draws": [Case(noticed("states", [1, 1, 1, 1]))],
    "shift": [Case(lambda f: set_targets(f, True, 0)), Case(lambda f: set_targets(f, True, 2))],
    "same-batch": [Case(same_batch)],
    "repeats": [Case(same_batch), Case(held_twice, "advice")],
    "own-targets": [Case(of_others), Case(of_tags, "advice")],
    "never-a-target": [Case(token_masked, "advice")],
    "ends-untrained": [
        Case(masked(2, None), "advice", ready=padded(masks=True), words="several tokens"),
        Case(ends_masked, "advice", ready=padded(masks=True), words="the last targets differ"),
    ],
    "padding-trained": [Case(padded(masks=False), ready=padded(masks=True))],
    "ignored-counted": [Case(unreduced(right=False), ready=unreduced(right=True))],
    "loss-input": [Case(probabilities)],
    "loss-precision": [Case(lambda f: set_entropies(f, dtype=torch.bfloat16))],
    "loss-finite": [Case(nan_loss)],
    "first-counted": [
        Case(divided_by_count(1), "advice", ready=divided_by_count(0), words="one more for each of"),
    ],
    "told-loss": [
        Case(told("loss {0}.5000"), "advice"),
        Case(told_doubled, words="2 times as large"),
        Case(averaged, "advice", ready=in_compiled_code),
        Case(told_alone, "advice", ready=told_mean, ranks=2, words="process 0 alone"),
    ],
    "eval-mode": [Case(lambda f: set_forwards(f, training=False))],
    "parts-in-eval-mode": [
        Case(lambda f: set_forwards(f, other_mode=("h.0",)), "advice"),
        Case(lambda f: set_forwards(f, other_mode=("h", "h.drop")), ready=field("dropout", {"h.drop": True})),
    ],
    "looks-ahead": [Case(lambda f: setattr(f, "probed", replace(f.probed, looks_ahead=2)))],
    "rows-mix": [Case(lambda f: setattr(f, "probed", replace(f.probed, rows_mix=True)))],
    "context-unused": [Case(lambda f: setattr(f, "probed", replace(f.probed, uses_context=False)), "advice")],
    "phases-repeat": [Case(noticed("phases", {"cos": 3}), ready=noticed("phases", {"cos": 0}))],
    "evaluation-shift": [Case(lambda f: set_targets(f, False, 0))],
    "evaluation-drops": [Case(noticed("drops", ["dropout in Block"]))],
    "evaluation-averages": [Case(noticed("averages_unused", True), ready=noticed("averages", True))],
    "evaluated-and-trained": [Case(held_out_again, "advice"), Case(last_one_trained)],
    "resume-found": [Case(both(noticed("absent", ["a.pt"]), noticed("reads", [])), "advice", make=resumed)],
    "resume-names": [Case(noticed("loads", [Load("GPT", 4, 0, 0)]), make=resumed)],
    "resume-weights": [
        Case(noticed("overwritten", ["wte.weight", "h.0.weight", "norm.weight"]), make=resumed),
        Case(noticed("overwritten", ["wte.weight"]), "advice", make=resumed),
    ],
    "resume-precision": [Case(noticed("loads", [Load("GPT", 4, 4, 4)]), make=resumed)],
    "resume-optimizer": [
        Case(no_moments, "advice", make=resumed),
        Case(both(no_moments, noticed("asked", True)), make=resumed),
        Case(not_saved, "advice", make=resumed),
        Case(both(not_saved, noticed("asked", True)), make=resumed),
    ],
    "resume-schedule": [
        Case(steps(lr=0.1), "advice", make=resumed),
        Case(steps(lr=0.1, initial_lr=0.8), ready=noticed("asked", True), make=resumed),
    ],
    "resume-generator": [
        Case(noticed("restored", []), "advice", make=resumed),
        Case(noticed("restored", []), ready=noticed("asked", True), make=resumed),
    ],
    "same-data": [
        Case(lambda f: setattr(f.trace, "forwards", healthy().trace.forwards), ranks=2),
        Case(
            both(lambda f: setattr(f.trace, "forwards", healthy().trace.forwards), field("connected", False)),
            "advice",
            ranks=2,
            words="train by themselves",
        ),
    ],
    "starts-differ": [
        Case(lambda f: setattr(f.trace, "measured_initial", healthy(seed=f.rank).trace.measured_initial), ranks=2)
    ],
    "replicas-apart": [Case(replica_moves, ranks=2), Case(replica_moves_in_pairs, ranks=2)],
    "same-masks": [Case(field("generators", {"cpu": 3}), ranks=2)],
    "one-factor": [Case(own_factor, ranks=2)],
    "summed-gradients": [Case(sums, ranks=2, ready=field("wrappers", ()))],
    "uneven-targets": [Case(fewer_targets, ranks=2)],
}


def facts_of(case: Case) -> list[Facts]:
    """Return the facts that a case begins with."""
    if case.make is not None:
        return [case.make()]
    return [healthy(rank, case.ranks) for rank in range(case.ranks)]


def outcome(name: str, ranks: list[Facts]) -> tuple[str, str]:
    """Return what a rule says, and its words."""
    found = judge(RULES[name], Seen(ranks[0], ranks))
    return found.outcome, f"{found.expected} {found.seen} {found.reason}"


ALL = [(name, case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), ALL, ids=[f"{name}-{n}" for n, (name, _) in enumerate(ALL)])
def test_accuses_what_is_faulty_and_nothing_else(name: str, case: Case) -> None:
    ranks = facts_of(case)
    for facts in ranks:
        case.ready(facts)
    said, words = outcome(name, ranks)
    assert said == "ok", words
    for facts in ranks:
        case.spoil(facts)
    said, words = outcome(name, ranks)
    assert said == case.outcome, words
    assert case.words in words


def test_a_step_from_nan_is_not_called_another_step() -> None:
    facts = healthy()
    spoilt = {name: tensor * torch.nan for name, tensor in facts.updates[1].after.items()}
    set_update(facts, 1, gradients=Named(spoilt), measured_gradients=measures(spoilt))
    set_update(facts, 1, after=Named(spoilt), measured_after=measures(spoilt))
    assert outcome("closed-form", [facts])[0] == "ok"
    assert outcome("not-finite", [facts])[0] == "fault"


def test_parts_of_one_model_in_plain_tensors_are_no_replicas() -> None:
    """The processes share their batches; a weight is another part on each, a bias begins at zero and becomes one."""
    ranks = [healthy(0, 2), healthy(0, 2)]
    part = {**ranks[1].trace.initial, "h.0.weight": torch.ones(SHAPES["h.0.weight"])}
    ranks[1].rank, ranks[1].trace.measured_initial = 1, measures(part)
    replica_moves(ranks[1])
    for name in ("starts-differ", "replicas-apart"):
        said, words = outcome(name, ranks)
        assert said == "not looked at", words
        assert "may hold parts of one model" in words


def test_every_rule_has_a_case() -> None:
    own = {
        name for name, rule in RULES.items() if rule.topic not in ("expected", "speed", "resumed")
    }  # these have tests of their own
    assert own == set(CASES)


def test_a_healthy_run_is_accused_of_nothing() -> None:
    for ranks in ([healthy()], [resumed()], [healthy(0, 2), healthy(1, 2)]):
        for name, rule in RULES.items():
            if rule.topic != "expected":
                said, words = outcome(name, ranks)
                assert said in ("ok", "not looked at"), f"{name}: {words}"
                assert "the rule itself broke" not in words, f"{name}: {words}"


def test_a_run_of_which_nothing_was_seen_is_never_ok() -> None:
    empty = Facts()
    said = {name: outcome(name, [empty])[0] for name, rule in RULES.items() if rule.topic != "expected"}
    assert set(said.values()) == {"not looked at"}, {name for name, what in said.items() if what != "not looked at"}
