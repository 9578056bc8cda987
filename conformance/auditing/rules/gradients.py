"""Gradients: where they come from, how they are added up and clipped, and what the step makes of them."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conformance.auditing.entropies import shares
from conformance.auditing.facts import Facts
from conformance.auditing.held import COARSE, float32_copies, groups_of, steps
from conformance.auditing.passes import special
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.weights import updates
from conformance.checks.step import History, follows_closed_form
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Update

CLOSE = 0.02
"""Relative: norms of 16-bit gradients, and of gradients that other processes change, agree this well."""


@rule(
    "no-gradient",
    "gradients",
    why="A tensor without a gradient is not trained. Often a part of the model is not in the forward any more.",
    mend="Follow the forward to the tensor: a `detach`, a `no_grad`, an overwritten attribute, a branch that is never "
    "taken. Freeze it by requires_grad=False if that is meant.",
    source="pytorch: DDP, find_unused_parameters",
)
def has_gradient(seen: Seen) -> None:
    """Every trained tensor has a gradient in some update."""
    facts = seen.facts
    found, owned = updates(facts), groups_of(facts)
    owned |= {name: owned[copy] for name, copy in float32_copies(facts).items()}
    pushed = {name for backward in facts.backwards for name in backward.norms}
    if all(value is None for update in found for value in update.gradients.values()):
        refuse_empty_steps(facts, pushed)
        raise NotApplicable("the step was seen after the gradients were gone")
    without = [
        name
        for name, info in facts.trace.tensors.items()
        if info.trainable and name not in pushed and all(update.gradients.get(name) is None for update in found)
    ]
    lost = [name for name in without if name in owned]
    idle = experts_without_tokens(lost, pushed)
    if lost and len(idle) < len(lost):
        raise Violation(
            f"a gradient for every tensor in a group, within {len(found)} updates",
            f"never one for {quoted([name for name in lost if name not in idle])}",
        )
    if idle:
        raise Doubt(
            f"a gradient for every tensor in a group, within {len(found)} updates",
            f"never one for {quoted(idle)}, while other experts have one: no token was sent to these",
        )
    if without:
        raise Doubt(
            "a gradient for every trainable tensor", f"never one for {quoted(without)}, which no optimizer holds"
        )
    zero = [
        name
        for name, info in facts.trace.tensors.items()
        if info.trainable and name in owned and all(is_zero(update, name) for update in found)
    ]
    if zero:
        raise Doubt("gradients that are not zero", f"zero in all {len(found)} updates: {quoted(zero)}")


def experts_without_tokens(lost: list[str], pushed: set[str]) -> list[str]:
    """Return those tensors without a gradient that belong to an expert of which another one has a gradient."""
    kinds = {re.sub(r"\d+", "*", name) for name in pushed}
    return [name for name in lost if "expert" in name.lower() and re.sub(r"\d+", "*", name) in kinds]


def refuse_empty_steps(facts: Facts, pushed: set[str]) -> None:
    """Raise Violation if backward gave gradients, the optimizer's own step found none, and nothing moved."""
    for number, update in enumerate(facts.updates, start=1):
        first, last = update.measured_before, update.measured_after
        if any(step.in_backward or step.skipped for step in update.steps) or first is None or last is None:
            return
        if any(name in last.bits and not torch.equal(bits, last.bits[name]) for name, bits in first.bits.items()):
            return
        if pushed & set(first.bits):
            raise Violation(
                f"gradients at the step of update {number}",
                "there are none, though the backward gave some: they are cleared before the step",
            )


def is_zero(update: Update, name: str) -> bool:
    """Return True if the whole gradient of a tensor is zero."""
    measured = update.measured_gradients
    return measured is not None and name in measured.norms and not bool(measured.norms[name])


@rule(
    "leftover-gradient",
    "gradients",
    why="PyTorch adds gradients up. Without zero_grad each update also takes all the steps of those before it.",
    mend="Call optimizer.zero_grad() once per update, after the step (or before the first backward).",
    source="the most common fault of hand-written loops",
)
def no_leftover(seen: Seen) -> None:
    """The gradients of an update are cleared before the first backward of the next update."""
    kept = [name for name, norm in seen.facts.noticed.kept.items() if not bool(norm == 0)]
    if kept:
        raise Violation(
            "a closure clears the gradients before its backward", f"evaluated again, it finds those of {quoted(kept)}"
        )
    if not seen.facts.leftovers:
        raise NotApplicable("fewer than two updates were seen")
    for update, norms in seen.facts.leftovers.items():
        # What no backward of the update adds to waits to be cleared: of two models that train in turn, the other's.
        passes = [backward.norms for backward in seen.facts.backwards if backward.update == update]
        waits = {n for n, norm in norms.items() if passes and all(n in p and bool(p[n] == norm) for p in passes)}
        left = [name for name, norm in norms.items() if not bool(norm == 0) and name not in waits]
        if left:
            raise Violation(
                f"gradients of update {update} are gone before the backward of update {update + 1}",
                f"still there: {quoted(left)}",
            )


@rule(
    "microbatch-lost",
    "gradients",
    why="An update that uses one of its microbatches only throws the others away: their forward and backward cost time "
    "for nothing, and the batch is smaller than you think.",
    mend="Clear gradients once per update. Let the last backward of an update reduce and add its gradients (no_sync, "
    "set_requires_gradient_sync), as the ones before it do.",
    source="build-nanogpt#30; hand-written loops",
)
def adds_all_microbatches(seen: Seen) -> None:
    """Every microbatch of an update adds to its gradient."""
    facts, owned = seen.facts, groups_of(seen.facts)
    refuse_closures(facts)
    several = False
    for number in range(len(facts.updates)):
        passes = [backward for backward in facts.backwards if backward.update == number]
        if len(passes) < 2 or any(step.in_backward for step in facts.updates[number].steps):
            continue
        several = True
        if reason := special(facts, number):
            raise NotApplicable(reason)
        cleared = [name for update, name in facts.noticed.cleared if update == number and name in owned]
        if cleared:
            raise Violation(
                f"the gradients of all {len(passes)} microbatches of update {number + 1}",
                f"cleared between its backward passes: that of {quoted(cleared)} was gone {len(cleared)} times",
            )
        before, last = passes[-2].norms, passes[-1].norms
        same = [name for name in before if name in last and before[name].item() == last[name].item()]
        if before and len(same) == len(before) == len(last) and any(before[name].item() for name in same):
            raise Violation(
                f"the last backward of update {number + 1} adds to the gradients",
                "it left every gradient as it was: its own went nowhere",
            )
    if not several:
        raise NotApplicable("no update has more than one microbatch")


def refuse_closures(facts: Facts) -> None:
    """Raise NotApplicable where a step evaluates its closure several times: those are not microbatches."""
    if any(step.evaluations > 1 for update in facts.updates for step in update.steps):
        raise NotApplicable("the optimizer evaluates a closure several times")


@rule(
    "unregistered",
    "gradients",
    why="A module in a plain Python list is not among the model's parameters: it is neither trained, moved nor saved.",
    mend="Use nn.ModuleList, nn.ModuleDict or nn.ParameterList.",
    source="PyTorch FAQ: modules in lists",
)
def registered(seen: Seen) -> None:
    """Every module that computes inside the model is registered in it."""
    facts = seen.facts
    if facts.unregistered:
        names = list(facts.unregistered)
        raise Violation("all modules with parameters are registered", f"called, but not registered: {quoted(names)}")
    # FSDP computes with whole tensors that it gathers: they are leaves, and no parameters.
    if facts.foreign_leaves and not facts.sharded:
        shapes = [str(shape) for shape in facts.foreign_leaves]
        raise Violation(
            "the loss depends on parameters of the model, or of an optimizer",
            f"it depends on {len(shapes)} more tensors that nobody trains, of shape {quoted(shapes)}",
        )
    if facts.leaves is None:
        raise NotApplicable("the graph of the first loss could not be read")


@rule(
    "loss-scale",
    "gradients",
    why="An accumulated gradient that is k times too long hits the clipping limit k times as hard, and SGD steps k "
    "times as far. Divided twice, it is k times too short.",
    mend="Divide the loss of each microbatch by their number (or by the update's targets) exactly once; look whether "
    "your library (accelerate, Lightning, DeepSpeed) does it already.",
    source="transformers#34191, accelerate#3074",
)
def loss_scale(seen: Seen) -> None:
    """The losses of an update's microbatches add up to one mean over its targets."""
    facts = seen.facts
    refuse_closures(facts)
    weights = shares(facts)
    scaled = [abs(weight * counted) > SCALED for update in weights for weight, counted in update]
    if max((len(update) for update in weights), default=0) < 2 and not any(scaled):
        raise NotApplicable("no update has more than one microbatch")
    for number, update in enumerate(weights):
        count, total = len(update), sum(weight * counted for weight, counted in update)
        if number < len(facts.updates) and (reason := special(facts, number)):
            raise NotApplicable(reason)
        if number >= len(facts.updates) or facts.updates[number].skipped:
            continue
        undone = rescaled(facts, number)
        if total > SCALED * count and undone is not None and undone > 0.5:
            raise Violation(
                f"gradients that are unscaled before the step of update {number + 1}",
                f"the loss is {total / count:.4g} times too large, as for float16; so are the gradients at the step",
            )
        if undone is None and total > SCALED * count:
            raise NotApplicable("the loss is scaled, as for float16, and it was not seen how gradients are unscaled")
        total *= undone or 1.0
        if count < 2 and not any(scaled):
            continue
        expected = f"the losses of the {count} microbatches of update {number + 1} weigh 1 together"
        if count > 1 and abs(total / count - 1) < 0.05:
            raise Violation(expected, f"they weigh {total:.3g}: each counts in full, none is divided by {count}")
        if count > 1 and abs(total * count - 1) < 0.05:
            raise Violation(expected, f"they weigh {total:.3g}: they are divided by {count} twice")
        if abs(total - 1) > 0.3:
            raise Doubt(expected, f"they weigh {total:.3g}")


SCALED = 64
"""Weight of a microbatch above which its loss is scaled on purpose, as for float16."""


def rescaled(facts: Facts, number: int) -> float | None:
    """Return by how much the gradient was scaled between the last backward of an update and clipping, or the step.

    None if that cannot be said: other processes take part in the gradient, or it changed otherwise than by a factor.
    """
    if facts.sharded or facts.world > 1:
        return None
    last = [backward for backward in facts.backwards if backward.update == number][-1]
    ended = total_norm(last.norms)
    clips = [clip for clip in facts.clips if clip.update == number and clip.norm is not None and clip.kind == "norm"]
    measured = facts.updates[number].measured_gradients
    if len(clips) == 1 and clips[0].norm is not None and len(clips[0].tensors) >= len(last.norms):
        reached = clips[0].norm.item()
        if "another tensor" in clips[0].tensors:  # a float32 copy, to which the gradients were added by hand
            return None
    elif not clips and measured is not None:
        reached = total_norm({name: norm for name, norm in measured.norms.items() if name in last.norms})
    else:
        return None
    factor = reached / ended if ended else 1.0
    if not math.isfinite(factor) or factor <= 0:
        return None
    if abs(factor - 1) < CLOSE:
        return 1.0
    whole = max(factor, 1 / factor)
    return factor if abs(whole - round(whole)) < CLOSE * whole else None


def total_norm(norms: "dict[str, Tensor]") -> float:
    """Return the length of the vector that all gradients form together, from the norm of each."""
    return math.sqrt(sum(norm.double().item() ** 2 for norm in norms.values()))


@rule(
    "mean-of-means",
    "gradients",
    why="Where microbatches have different numbers of targets, the mean of their means weighs tokens of short ones "
    "more. The loss curve looks fine; the gradient is another one.",
    mend="Divide the sum of each microbatch's loss by the number of targets of the whole update, over all processes.",
    source="transformers#34191 (unsloth: Bugs in LLM training, 2024)",
)
def targets_weigh_alike(seen: Seen) -> None:
    """Every target of an update weighs the same in its loss, whatever microbatch it is in."""
    uneven = False
    for number, update in enumerate(shares(seen.facts), start=1):
        counts, weights = [counted for _, counted in update], [weight for weight, _ in update]
        if len(set(counts)) < 2:
            continue
        uneven = True
        spread = max(weights) / min(weights)
        if min(weights) > 0 and spread > 1 + max(0.01, 0.1 * (max(counts) / min(counts) - 1)):
            raise Violation(
                f"each target of update {number} has the same weight",
                f"targets weigh up to {spread:.3g} times as much as others; the microbatches have {quoted(counts)}",
            )
    if not uneven:
        raise NotApplicable("all microbatches of an update have the same number of targets")


@rule(
    "closed-form",
    "gradients",
    why="Whatever happens between gradient and weights shows here: another epsilon, no bias correction, coupled "
    "instead of decoupled decay, a step that skips or doubles.",
    mend="Compare your optimizer, and what wraps it, with the formula in torch.optim's documentation.",
    source="conformance: checks/step.py",
)
def closed_form(seen: Seen) -> None:
    """Each tensor moves by the closed form of its optimizer."""
    facts, history = seen.facts, History()
    steps(facts)
    looked, stepped_by = 0, dict[str, int]()
    for number, update in enumerate(facts.updates, start=1):
        measured = update.measured_gradients
        if measured is not None and not all(norm.isfinite() for norm in measured.norms.values()):
            history.reasons[""] = "a gradient is not finite"  # of what comes after it, not-finite tells
            break
        names = [name for step in update.steps for name in step.tensors]
        for step in update.steps:
            if step.skipped:
                continue
            found = {}
            for group in step.groups:
                for name in group.tensors:
                    info = facts.trace.tensors.get(name)
                    if info is None or names.count(name) > 1 or name not in update.before or name not in update.after:
                        continue
                    kind = info.dtype
                    known = ~update.before[name].isnan()  # of a sharded tensor: the part of this process
                    if not known.any():
                        continue
                    gradient = update.gradients.get(name)
                    state = update.state_before.get(name)
                    if stepped_by.setdefault(name, step.number) != step.number:  # a new optimizer, with its own state
                        history.states.pop(name, None)
                    if (number == 1 or name not in history.states) and state and tensors_only(state):
                        history.states[name] = part_of(state, known)
                    stepped_by[name] = step.number
                    deviation = history.follow(
                        name,
                        step.optimizer,
                        group.settings,
                        None if gradient is None else gradient[known],
                        update.before[name][known].to(kind),
                        update.after[name][known].to(kind),
                        part_of(state, known) if kind in COARSE and state and tensors_only(state) else None,
                    )
                    if deviation is not None:
                        found[name] = deviation
            looked += len(found)
            if found:
                follows_closed_form(found, step.optimizer[0].rpartition(".")[2], number)
    if not looked:
        reasons = sorted(set(history.reasons.values()))
        raise NotApplicable(reasons[0] if reasons else "no tensor's step was seen")


def part_of(state: Mapping[str, Any], known: Tensor) -> dict[str, Any]:
    """Return the state of the elements that this process knows."""
    alike = {key: isinstance(value, Tensor) and value.shape == known.shape for key, value in state.items()}
    return {key: value[known] if alike[key] else value for key, value in state.items()}


def tensors_only(state: dict[str, object]) -> bool:
    """Return True if all of an optimizer's state was kept."""
    return not any(isinstance(value, str) for value in state.values())


@rule(
    "lost-to-rounding",
    "gradients",
    why="A step smaller than half the distance between two 16-bit numbers changes nothing.",
    mend="Keep float32 weights, or round stochastically.",
    source="Zamirai et al. 2020, Revisiting BFloat16 Training",
    advice=True,
)
def not_lost(seen: Seen) -> None:
    """Most of the sampled weights of 16-bit tensors change in an update."""
    facts = seen.facts
    coarse = [n for n, info in facts.trace.tensors.items() if info.dtype in COARSE and info.trainable]
    if not coarse:
        raise NotApplicable("no trained tensor has 16 bits")
    asked = moved = 0
    for update in updates(facts):
        for name in coarse:
            gradient = update.gradients.get(name)
            if gradient is None or name not in update.before:
                continue
            live = gradient != 0
            asked += int(live.sum())
            moved += int((live & (update.before[name] != update.after[name])).sum())
    if asked and moved < asked / 2:
        raise Violation("most weights with a gradient change", f"{1 - moved / asked:.0%} of the sampled ones do not")
