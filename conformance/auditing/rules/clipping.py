"""Clipping: of the whole gradient, once, and with an effect on the step."""

import math

from conformance.auditing.facts import Clip, Facts
from conformance.auditing.passes import special
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.gradients import CLOSE, total_norm
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Update


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
    """The whole gradient of an update is clipped once, and the optimizer steps with the clipped gradient."""
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
        if reason := special(facts, number):
            raise NotApplicable(reason)
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
