"""A run that was resumed from what an earlier one left: ``--resume-with``."""

import torch
from torch import Tensor

from conformance.auditing.facts import Facts
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.weights import updates
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import Measures, Update


def earlier(seen: Seen) -> Facts:
    """Return the facts of the run that left the checkpoint."""
    if seen.earlier is None:
        raise NotApplicable("--resume-with was not given")
    updates(seen.earlier)
    return seen.earlier


def left_after(seen: Seen) -> int:
    """Return after which update of the earlier run the resumed one goes on; 0: from its start.

    Raises:
        NotApplicable: if its weights are those of no recorded update.
    """
    first = earlier(seen)
    start = seen.facts.trace.measured_initial
    if start is None or not start.bits:
        raise NotApplicable("the audit did not see the resumed model before its first update")
    places = [first.trace.measured_initial, *(update.measured_after for update in first.updates)]
    for number in reversed(range(len(places))):
        place = places[number]
        if place is not None and same_bits(place, start):
            return number
    raise NotApplicable("the resumed run starts from weights that the first run had after no recorded update")


def same_bits(first: Measures, second: Measures) -> bool:
    """Return True if all weights are the same, bit for bit."""
    names = first.bits.keys() & second.bits.keys()
    return bool(names) and all(torch.equal(first.bits[name], second.bits[name]) for name in names)


@rule(
    "resumed-weights",
    "resumed",
    why="A resumed run that starts from other weights is a new run that carries the old one's name.",
    mend="Load the model before it is wrapped and before the optimizer is built, with strict=True, and look at what "
    "load_state_dict returns.",
    source="litgpt#1938; torchtitan#1055",
)
def resumed_weights(seen: Seen) -> None:
    """A resumed run starts from weights that the first run had, and not from its beginning."""
    first = earlier(seen)
    try:
        number = left_after(seen)
    except NotApplicable as reason:
        if "no recorded update" not in str(reason):
            raise
        words = "the weights at the start of the resumed run are those of no recorded update"
        raise Violation(f"the weights after one of {len(first.updates)} updates", words) from None
    if number == 0:
        raise Violation("the weights of a checkpoint", "the resumed run starts from the same fresh weights")


@rule(
    "resumed-optimizer",
    "resumed",
    why="Without its moments AdamW takes first steps that are many times too long, and the loss jumps.",
    mend="Save and load optimizer.state_dict(), after the optimizer was built over the same groups in the same order.",
    source="transformers#21294; nanotron#77",
)
def resumed_state(seen: Seen) -> None:
    """A resumed run goes on with the optimizer's state."""
    first, number = earlier(seen), left_after(seen)
    kept = first.updates[-1].state_after or first.updates[0].state_after
    if not kept:
        raise NotApplicable("the optimizer of the first run keeps no state")
    if not seen.facts.updates:
        raise NotApplicable("the resumed run made no update")
    found = seen.facts.updates[0].state_before
    lost = [name for name in kept if not found.get(name)]
    if lost:
        raise Violation("state of all tensors before the first resumed step", f"no state of {quoted(lost)}")
    for name, entry in found.items():
        count = entry.get("step")
        steps = count.item() if isinstance(count, Tensor) else count
        if isinstance(steps, int | float) and steps != number:
            raise Violation(f"a step counter of {number}, as after update {number}", f"{steps:g} for {name}")
    if number == len(first.updates):
        bad = [name for name, entry in kept.items() if not same_state(entry, found.get(name, {}))]
        if bad:
            raise Violation("the same state, bit for bit", f"it differs for {quoted(bad)}")


def same_state(first: dict[str, object], second: dict[str, object]) -> bool:
    """Return True if all sampled state is the same."""
    for key, value in first.items():
        other = second.get(key)
        if isinstance(value, Tensor) and not (isinstance(other, Tensor) and torch.equal(value, other)):
            return False
    return True


@rule(
    "resumed-rate",
    "resumed",
    why="A schedule that begins again warms up a trained model, or jumps back to the peak rate.",
    mend="Save and load the scheduler, or compute the rate from the number of the update.",
    source="pytorch-lightning#4655; accelerate#2043",
)
def resumed_rate(seen: Seen) -> None:
    """A resumed run goes on with the learning rate that comes next."""
    first, number = earlier(seen), left_after(seen)
    if number >= len(first.updates) or not seen.facts.updates:
        raise NotApplicable("the first run's rate after the checkpoint was not recorded: give more --updates")
    # A loaded optimizer brings its last rate along: a schedule that begins again shows in the next update.
    for place, (old, new) in enumerate(zip(first.updates[number:], seen.facts.updates, strict=False), start=1):
        wanted, found = rates_of(old), rates_of(new)
        if len(wanted) != len(found):
            raise Violation(f"{len(wanted)} parameter groups", f"{len(found)}")
        if any(abs(a - b) > 1e-6 * max(abs(a), abs(b)) for a, b in zip(wanted, found, strict=True)):
            expected = f"in update {place} after the resume, the rates of update {number + place} of the first run"
            raise Violation(f"{expected}: {quoted([f'{a:g}' for a in wanted])}", quoted([f"{b:g}" for b in found]))


def rates_of(update: Update) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group.settings["lr"]) for group in update.groups if group.settings.get("lr") is not None]


@rule(
    "resumed-data",
    "resumed",
    why="A run that begins its data again at every restart sees the first part often and the last one never.",
    mend="Save the sampler's position and the generators, or skip what was seen.",
    source="transformers#31441; litgpt#1073",
)
def resumed_data(seen: Seen) -> None:
    """A resumed run goes on with the data that comes next."""
    first, number = earlier(seen), left_after(seen)
    if number == 0:
        raise NotApplicable("the resumed run starts from the beginning")
    batches = [rows_of(first, update) for update in range(len(first.updates))]
    found = rows_of(seen.facts, 0)
    if not found or not all(batches):
        raise NotApplicable("token ids were not seen in both runs")
    if found == batches[0] and number > 0 and batches[0] not in batches[1:]:
        raise Violation(f"the batch that comes after update {number}", "the batch of update 1 again")
    if number < len(batches) and found != batches[number]:
        raise Doubt(f"the batch of update {number + 1} of the first run", "another batch")


def rows_of(facts: Facts, number: int) -> tuple[tuple[int, ...], ...]:
    """Return the sequences of an update, in their order."""
    forwards = [f for f in facts.trace.forwards if f.grad_enabled and f.update == number]
    return tuple(tuple(row) for forward in forwards for row in forward.ids.tolist())
