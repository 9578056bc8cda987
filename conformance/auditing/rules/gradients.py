"""Gradients: where they come from, how they are added up and clipped, and what the step makes of them."""

import math

from torch import Tensor

from conformance.auditing.entropies import UNSEEN
from conformance.auditing.facts import Clip, Facts
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.groups import groups_of, steps
from conformance.auditing.rules.weights import COARSE, updates
from conformance.checks.step import History, follows_closed_form
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import CrossEntropy, Update

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
    if all(value is None for update in found for value in update.gradients.values()):
        raise NotApplicable("the step was seen after the gradients were gone")
    without = [
        name
        for name, info in facts.trace.tensors.items()
        if info.trainable and all(update.gradients.get(name) is None for update in found)
    ]
    lost = [name for name in without if name in owned]
    if lost:
        raise Violation(
            f"a gradient for every tensor in a group, within {len(found)} updates", f"never one for {quoted(lost)}"
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
    """No gradient of an update is there when the backward of the next begins."""
    if not seen.facts.leftovers:
        raise NotApplicable("fewer than two updates were seen")
    for update, norms in seen.facts.leftovers.items():
        left = [name for name, norm in norms.items() if not bool(norm == 0)]
        if left:
            raise Violation(
                f"gradients of update {update} are gone before the backward of update {update + 1}",
                f"still there: {quoted(left)}",
            )


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
    if facts.foreign_leaves:
        shapes = [str(shape) for shape in facts.foreign_leaves]
        raise Violation(
            "the loss depends on parameters of the model, or of an optimizer",
            f"it depends on {len(shapes)} more tensors that nobody trains, of shape {quoted(shapes)}",
        )
    if facts.leaves is None:
        raise NotApplicable("the graph of the first loss could not be read")


def entropies_by_backward(facts: Facts) -> list[list[CrossEntropy]]:
    """Return the cross entropies that each backward pass was given, in order. Raises NotApplicable if unclear."""
    found: list[list[CrossEntropy]] = [[] for _ in facts.backwards]
    if not facts.trace.entropies:
        raise NotApplicable(UNSEEN)
    for entropy, given in zip(facts.trace.entropies, facts.given, strict=True):
        if given is None:
            raise NotApplicable("a cross entropy was computed from something else than a matrix of logits")
        if entropy.grad_enabled and given.backward < len(found):
            found[given.backward].append(entropy)
    if not all(found):
        raise NotApplicable("some backward passes begin without a cross entropy before them")
    for entropies in found:
        if len(entropies) > 1 and any(entropy.reduction != "sum" for entropy in entropies):
            raise NotApplicable("several cross entropies belong to one backward pass")
    if any(e.label_smoothing or e.reduction == "none" for entropies in found for e in entropies):
        raise NotApplicable("the loss weighs or smooths its targets by itself")
    return found


def shares(facts: Facts) -> list[list[tuple[float, int]]]:
    """Return, for each update and each of its backward passes, the weight of a target in the loss, and their number."""
    found = entropies_by_backward(facts)
    result: list[list[tuple[float, int]]] = [[] for _ in facts.updates]
    for backward, entropies in zip(facts.backwards, found, strict=True):
        counted = sum(entropy.counted for entropy in entropies)
        total = sum(entropy.total for entropy in entropies)
        loss = sum(loss.item() for loss in backward.losses)
        if not counted or not total or not math.isfinite(loss):
            raise NotApplicable("a loss is zero or not finite")
        if backward.update < len(result):
            result[backward.update].append((loss / total, counted))
    if any(abs(weight * counted) > 64 for update in result for weight, counted in update):
        raise NotApplicable("the loss is scaled, as for float16")
    return [update for update in result if update]


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
    weights = shares(facts)
    if max((len(update) for update in weights), default=0) < 2:
        raise NotApplicable("no update has more than one microbatch")
    for number, update in enumerate(weights):
        count, total = len(update), sum(weight * counted for weight, counted in update)
        if count < 2:
            continue
        undone = rescaled(facts, number)
        total *= undone
        expected = f"the losses of the {count} microbatches of update {number + 1} weigh 1 together"
        if abs(total / count - 1) < 0.05:
            raise Violation(expected, f"they weigh {total:.3g}: each counts in full, none is divided by {count}")
        if abs(total * count - 1) < 0.05:
            raise Violation(expected, f"they weigh {total:.3g}: they are divided by {count} twice")
        if abs(total - 1) > 0.3:
            raise Doubt(expected, f"they weigh {total:.3g}")


def rescaled(facts: Facts, number: int) -> float:
    """Return by how much the gradient was scaled between the last backward of an update and clipping, or the step."""
    last = [backward for backward in facts.backwards if backward.update == number][-1]
    ended = total_norm(last.norms)
    clips = [clip for clip in facts.clips if clip.update == number and clip.norm is not None and clip.kind == "norm"]
    measured = facts.updates[number].measured_gradients
    if len(clips) == 1 and clips[0].norm is not None and len(clips[0].tensors) >= len(last.norms):
        reached = clips[0].norm.item()
    elif not clips and measured is not None:
        reached = total_norm({name: norm for name, norm in measured.norms.items() if name in last.norms})
    else:
        return 1.0
    factor = reached / ended if ended else 1.0
    return 1.0 if abs(factor - 1) < CLOSE or not math.isfinite(factor) else factor


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
    "clipping",
    "gradients",
    why="Clipping in the wrong place does nothing, or clips something else: before the backward there is no gradient, "
    "per microbatch the limit holds for a part, before unscaling it compares with a scaled norm.",
    mend="After the last backward of an update (and after scaler.unscale_), call clip_grad_norm_ once, with a list of "
    "all trained parameters, and then step.",
    source="pytorch: AMP examples, gradient clipping",
)
def clipped_rightly(seen: Seen) -> None:
    """Clipping sees the whole gradient of an update, once, and the step gets the clipped one."""
    facts = seen.facts
    clips = [clip for clip in facts.clips if clip.update < len(facts.updates)]
    if not clips:
        raise NotApplicable("torch.nn.utils.clip_grad_norm_ and clip_grad_value_ were not called")
    owned = {name for update in facts.updates for group in update.groups for name in group.tensors}
    for number, update in enumerate(facts.updates):
        own = [clip for clip in clips if clip.update == number]
        passes = [backward for backward in facts.backwards if backward.update == number]
        if not own or not passes:
            continue
        where = f"update {number + 1}"
        if all(clip.backwards == 0 for clip in own):
            raise Violation(
                f"{where}: gradients are clipped after the backward passes and before the step",
                "they are clipped when there is no gradient of this update: before its first backward",
            )
        if len({clip.backwards for clip in own if clip.backwards}) > 1:
            raise Violation(
                f"{where}: the sum of all microbatches' gradients is clipped once",
                f"clipped after {quoted(sorted({clip.backwards for clip in own}))} of {len(passes)} microbatches",
            )
        if any(not clip.tensors for clip in own):
            raise Violation(
                f"{where}: clipping gets all trained tensors", "it gets none: a generator that is used up gives nothing"
            )
        single = [clip for clip in own if len(clip.tensors) == 1]
        if len(single) > max(4, len(own) // 2):
            raise Violation(f"{where}: one norm over all tensors", f"{len(single)} calls with one tensor each")
        given = {name for clip in own for name in clip.tensors}
        rest = sorted(name for name in owned - given if update.gradients.get(name) is not None)
        if rest and "another tensor" not in given:
            raise Doubt(f"{where}: all trained tensors are clipped", f"left out: {quoted(rest)}")
        check_effect(facts, update, own, where)


def check_effect(facts: Facts, update: Update, clips: list[Clip], where: str) -> None:
    """Check that the step finds the gradient that one call of ``clip_grad_norm_`` left."""
    clip, measured = clips[-1], update.measured_gradients
    if len(clips) > 1 or clip.kind != "norm" or clip.norm is None or measured is None or facts.sharded:
        return
    seen = clip.norm.double().item()
    step = total_norm({name: norm for name, norm in measured.norms.items() if name in clip.tensors})
    wanted = min(seen, clip.limit)
    if not math.isfinite(seen) or set(clip.tensors) - set(measured.norms) or clip.limit <= 0:
        return
    if abs(step - wanted) > CLOSE * wanted:
        raise Violation(
            f"{where}: clipping saw a gradient of norm {seen:.4g} with the limit {clip.limit:g}, so the step finds one "
            f"of {wanted:.4g}",
            f"the step finds a gradient of norm {step:.4g}",
        )


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
    looked = 0
    for number, update in enumerate(facts.updates, start=1):
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
                    state = update.state_before.get(name)
                    if number == 1 and state and tensors_only(state):
                        history.states[name] = dict(state)
                    deviation = history.follow(
                        name,
                        step.optimizer,
                        group.settings,
                        update.gradients.get(name),
                        update.before[name].to(kind),
                        update.after[name].to(kind),
                        state if kind in COARSE and state and tensors_only(state) else None,
                    )
                    if deviation is not None:
                        found[name] = deviation
            looked += len(found)
            if found:
                follows_closed_form(found, step.optimizer[0].rpartition(".")[2], number)
    if not looked:
        reasons = sorted(set(history.reasons.values()))
        raise NotApplicable(reasons[0] if reasons else "no tensor's step was seen")


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
