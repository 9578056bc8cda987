"""Find where two runs first differ: the update, the phase, the tensors, and by how much more than noise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from conformance.auditing.merged import Values, WholeRun, WholeUpdate
from conformance.errors import quoted

PHASES = ("start", "data", "forward", "gradient", "clipped gradient", "settings", "parameters")
# Relative, by the dtype in which both runs compute. Pairs that should agree (a repeat, DDP, FSDP2, tensor parallelism,
# another split into microbatches, compiled against eager) show at most a tenth of these.
BOUNDS = {
    "forward": {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3},
    "gradient": {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05},
    "parameters": {torch.float32: 0.05, torch.bfloat16: 0.5, torch.float16: 0.3},
}
"""Parameters are compared by their movement, whose small elements an Adam turns round."""
RATES = 1e-6
NORMS = 1e-5
"""Equal weights have equal samples; their norms, in float32, depend on how a tensor is split."""
TINY = 1e-3
"""A tensor whose gradient is shorter than this share of the longest shows rounding of sums, and little else."""


@dataclass(frozen=True)
class Difference:
    """What one phase of one update shows."""

    phase: str
    value: float
    """Relative difference; infinite where there is nothing to compare it with."""
    bound: float
    tensors: tuple[str, ...] = ()
    """The worst first."""
    words: str = ""
    cause: str = ""
    """The kind of cause, where the processes of one run differ from each other."""

    @property
    def parts(self) -> bool:
        """Whether the runs part here."""
        return not self.value <= self.bound


@dataclass
class Comparison:
    """Two runs, phase by phase, until they part."""

    updates: int
    """That both have."""
    seen: list[tuple[int, Difference]] = field(default_factory=list)
    """By update, counted from 1; 0 is the start."""
    unseen: list[str] = field(default_factory=list)
    """Phases that could not be compared, and why."""
    cause: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def parting(self) -> tuple[int, Difference] | None:
        """The first place where the runs part, if they do."""
        return next(((number, found) for number, found in self.seen if found.parts), None)


def compare(first: WholeRun, second: WholeRun, noise: "Comparison | None" = None) -> Comparison:
    """Compare two runs.

    Args:
        first: a run.
        second: another.
        noise: the same comparison of the first with its repeat; each bound is then twice the largest difference that
            the repeat shows in that phase, if that is more.
    """
    result = Comparison(min(len(first.updates), len(second.updates)))
    describe_runs(first, second, result)
    lost, new = sorted(set(first.sizes) - set(second.sizes)), sorted(set(second.sizes) - set(first.sizes))
    if lost or new:
        words = f"tensors only in the first run: {quoted(lost) or 'none'}; only in the second: {quoted(new) or 'none'}"
        result.seen.append((0, Difference("start", math.inf, 0.0, (*lost, *new), words)))
        result.cause = "the models have different tensors"
        return result
    steps = [(0, found) for found in drifted(first, second, 0, "start")]
    steps.append((0, started(first, second, result)))
    for number in range(result.updates):
        steps += [(number + 1, found) for found in update_phases(first, second, number, result)]
    for number, found in steps:
        found = replace(found, bound=max(found.bound, 2 * largest(noise, found.phase)))
        result.seen.append((number, found))
        if found.parts:
            result.cause = found.cause or cause_of(first, second, number, found)
            break
    return result


def largest(noise: Comparison | None, phase: str) -> float:
    """Return the largest difference that a repeat shows in a phase."""
    values = [found.value for _, found in noise.seen if found.phase == phase] if noise else []
    return max(filter(math.isfinite, values), default=0.0)  # what cannot be compared is no noise


def describe_runs(first: WholeRun, second: WholeRun, result: Comparison) -> None:
    """Note how the runs differ before any number is compared."""
    if first.processes != second.processes:
        result.notes.append(f"processes: {first.processes} and {second.processes}")
    if first.dtypes != second.dtypes:
        result.notes.append(
            f"dtypes of the computation: {quoted(sorted(map(str, first.dtypes)))} and {quoted(map(str, second.dtypes))}"
        )
    optimizers = [run.updates[0].optimizers if run.updates else () for run in (first, second)]
    if optimizers[0] != optimizers[1]:
        result.notes.append(f"optimizers: {quoted(optimizers[0])} and {quoted(optimizers[1])}")
    for which, run in ("first", first), ("second", second):
        if run.unseen:
            tell_once(result, f"the processes of the {which} run with each other ({run.unseen})")


def bound(first: WholeRun, second: WholeRun, phase: str, number: int = 0) -> float:
    """Return the largest difference in a phase of an update that is noise. It grows with every update."""
    table = BOUNDS[phase]
    kinds = (first.dtypes & second.dtypes) or {torch.float32}
    return max(table.get(kind, table[torch.float32]) for kind in kinds) * (1 + number)


def started(first: WholeRun, second: WholeRun, result: Comparison) -> Difference:
    """Compare the weights at the start."""
    if not first.initial.samples or not second.initial.samples:
        result.unseen.append("the start (a record lacks the weights before the first update)")
        return Difference("start", 0.0, 0.0)
    rounding = NORMS if first.weights == second.weights else 2.0**-8
    return vectors("start", first.initial, second.initial, first.sizes, rounding)


def update_phases(first: WholeRun, second: WholeRun, number: int, result: Comparison) -> Iterable[Difference]:
    """Yield what each phase of an update shows."""
    a, b = first.updates[number], second.updates[number]
    yield data(a, b, number, result)
    yield forward(a, b, bound(first, second, "forward", number), number, result)
    yield from drifted(first, second, number + 1, "gradient", "clipped gradient")
    yield from gradients(a, b, first.sizes, bound(first, second, "gradient", number))
    yield settings(a, b)
    yield from drifted(first, second, number + 1, "parameters")
    if a.before.samples and b.before.samples:
        moved = [Values({n: u.after.samples[n] - u.before.samples[n] for n in u.before.samples}) for u in (a, b)]
        yield vectors("parameters", moved[0], moved[1], first.sizes, bound(first, second, "parameters", number))


def drifted(first: WholeRun, second: WholeRun, number: int, *phases: str) -> Iterable[Difference]:
    """Yield where the processes of one run differ: the values of process 0, which are compared, do not show it."""
    for which, run in ("first", first), ("second", second):
        if (found := run.drift) is not None and found.update == number and found.phase in phases:
            words = f"the processes of the {which} run hold different copies: {found.words}"
            yield Difference(found.phase, math.inf, 0.0, found.tensors, words, found.cause)


def data(a: WholeUpdate, b: WholeUpdate, number: int, result: Comparison) -> Difference:
    """Compare the sequences of an update, in whatever order and split."""
    if not a.rows or not b.rows:
        tell_once(result, "the data (a record lacks the token ids)")
        return Difference("data", 0.0, 0.0)
    lengths = {len(row) for row in a.rows}, {len(row) for row in b.rows}
    if lengths[0] != lengths[1] and max(lengths[0]) - max(lengths[1]) in (-1, 1):  # one shifts inside the model
        shorter = min(max(own) for own in lengths)
        rows = tuple(sorted(row[:shorter] for row in a.rows)), tuple(sorted(row[:shorter] for row in b.rows))
    else:
        rows = a.rows, b.rows
    different = len(set(rows[0]) ^ set(rows[1]))
    share = different / (len(rows[0]) + len(rows[1]))
    if not different and len(rows[0]) != len(rows[1]):
        share = abs(len(rows[0]) - len(rows[1])) / len(rows[0])
    words = f"{len(rows[0])} and {len(rows[1])} sequences, of which {different} are in one run only"
    return Difference("data", share, 0.0, words=words if share else "")


def forward(a: WholeUpdate, b: WholeUpdate, limit: float, number: int, result: Comparison) -> Difference:
    """Compare the losses: cross entropies where both are seen, and what backward began at otherwise."""
    pair = (a.entropy, b.entropy) if a.entropy is not None and b.entropy is not None else (a.loss, b.loss)
    if pair[0] is None or pair[1] is None:
        tell_once(result, "the forward (a record lacks the loss)")
        return Difference("forward", 0.0, limit)
    value = abs(pair[0] - pair[1]) / max(abs(pair[0]), 1e-12)
    return Difference("forward", value, limit, words=f"loss {pair[0]:.6f} and {pair[1]:.6f}")


def gradients(a: WholeUpdate, b: WholeUpdate, sizes: dict[str, int], limit: float) -> Iterable[Difference]:
    """Compare what the step found, and say whether clipping or the gradient itself differs."""
    one_sided = sorted((a.without ^ b.without) & set(sizes))
    if one_sided:
        words = f"tensors with a gradient in one run only: {quoted(one_sided)}"
        yield Difference("gradient", math.inf, limit, tuple(one_sided), words)
        return
    found = vectors("gradient", a.gradients, b.gradients, sizes, limit)
    # One tensor that differs changes the norm, and clipping by it then scales all others, too.
    unclipped = vectors("gradient", a.unclipped, b.unclipped, sizes, limit)
    if found.parts and unclipped.parts:
        found = unclipped
    seen_before = bool(a.accumulated.norms and b.accumulated.norms)
    earlier = vectors("gradient", Values({}, a.accumulated.norms), Values({}, b.accumulated.norms), sizes, limit)
    if seen_before and earlier.parts and not found.parts:
        # Clipping hides a factor. Anything else is a run that reduces its gradients after the last backward.
        factor = shared_factor(a.accumulated, b.accumulated)
        yield (
            replace(earlier, words=f"the gradient differs by a factor of {factor:.4g}, which clipping hides")
            if factor
            else found
        )
    elif found.parts and (not unclipped.parts or (seen_before and not earlier.parts)):
        yield replace(found, phase="clipped gradient")
    else:
        yield found


def shared_factor(a: Values, b: Values) -> float:
    """Return the factor between two gradients if all tensors share one; 0 if they do not."""
    pairs = [(norm, b.norms[name]) for name, norm in a.norms.items() if name in b.norms]
    longest = max((norm for norm, _ in pairs), default=0.0)
    ratios = sorted(other / norm for norm, other in pairs if norm > TINY * longest)
    middle = ratios[len(ratios) // 2] if ratios else 1.0
    shared = abs(middle - 1) > 0.01 and all(abs(ratio / middle - 1) < 0.05 for ratio in ratios) if middle else False
    return middle if shared else 0.0


def settings(a: WholeUpdate, b: WholeUpdate) -> Difference:
    """Compare the hyper-parameters of each tensor."""
    bad: dict[str, str] = {}
    worst = 0.0
    for name in a.settings.keys() & b.settings.keys():
        for key in a.settings[name].keys() & b.settings[name].keys():
            one, other = a.settings[name][key], b.settings[name][key]
            difference = abs(one - other) / max(abs(one), abs(other), 1e-12)
            if difference > RATES:
                bad.setdefault(name, f"{key} {one:.6g} and {other:.6g}")
                worst = max(worst, difference)
    names = tuple(bad)
    return Difference("settings", worst, RATES, names, bad[names[0]] if names else "")


def vectors(phase: str, a: Values, b: Values, sizes: dict[str, int], limit: float) -> Difference:
    """Compare named tensors by their samples and norms, each relative to the tensor's own length."""
    names = [n for n in sizes if (n in a.samples and n in b.samples) or (n in a.norms and n in b.norms)]
    scale = {name: max(length(a, name, sizes), length(b, name, sizes)) for name in names}
    floor = TINY * max(scale.values(), default=0.0)
    errors: dict[str, float] = {}
    for name in names:
        size = max(scale[name], floor)
        if not size:
            continue
        error = 0.0
        if name in a.samples and name in b.samples and a.samples[name].shape == b.samples[name].shape:
            samples = a.samples[name].double(), b.samples[name].double()
            known = ~(samples[0].isnan() | samples[1].isnan())
            part = math.sqrt(max(int(known.sum()), 1) / max(sizes[name], 1))
            error = (samples[0] - samples[1])[known].norm().item() / (size * part)
        if name in a.norms and name in b.norms:
            error = max(error, abs(a.norms[name] - b.norms[name]) / size)
        errors[name] = error if math.isfinite(error) else math.inf
    worst = sorted(errors, key=lambda name: -errors[name])
    bad = tuple(name for name in worst if not errors[name] <= limit)
    return Difference(phase, errors[worst[0]] if worst else 0.0, limit, bad or tuple(worst[:1]))


def length(values: Values, name: str, sizes: dict[str, int]) -> float:
    """Return the length of a whole tensor: its norm, or an estimate from its samples."""
    if name in values.norms:
        return values.norms[name]
    sample = values.samples.get(name)
    if sample is None:
        return 0.0
    known = sample.double()[~sample.isnan()]
    return known.norm().item() * math.sqrt(sizes[name] / max(len(known), 1))


def tell_once(result: Comparison, words: str) -> None:
    """Say once that something could not be compared."""
    if words not in result.unseen:
        result.unseen.append(words)


def cause_of(first: WholeRun, second: WholeRun, number: int, found: Difference) -> str:
    """Return the kind of cause that a first difference looks like."""
    if found.phase == "start":
        return cause_of_start(first, second, found)
    a, b = first.updates[number - 1], second.updates[number - 1]
    if found.phase == "data":
        return cause_of_data(first, second, number - 1)
    if found.phase == "forward":
        if first.dtypes != second.dtypes:
            return "precision: the runs compute in different dtypes"
        if first.dropout or second.dropout:
            return "dropout: the masks differ (different seeds, or different numbers of processes)"
        pair = (a.loss, b.loss)
        if a.entropy is not None and b.entropy is not None:
            return "a different function: the same weights and data give a different loss"
        if pair[0] and pair[1] is not None:
            return f"the second run's loss is {pair[1] / pair[0]:.4g} times the first run's"
        return "a different loss"
    if found.phase == "clipped gradient" and (a.clip != b.clip or first.dtypes == second.dtypes):
        if a.clip != b.clip:
            return f"clipping: limits {a.clip} and {b.clip}"
        return f"{quoted(found.tensors)} changed between the last backward and the step in one of the runs"
    if found.phase == "settings":
        key = found.words.split(" ")[0]
        return "different learning rates" if key == "lr" else f"different values of the optimizer's {key}"
    if "gradient" in found.phase:
        return cause_of_gradient(first, second, a, b, found)
    return "the step: equal gradients and settings move the weights differently"


def cause_of_start(first: WholeRun, second: WholeRun, found: Difference) -> str:
    """Return why the weights at the start differ."""
    for number, update in enumerate(first.updates, start=1):
        if not vectors("start", update.after, second.initial, first.sizes, 1e-6).parts:
            return f"the second run starts from the weights that the first run had after update {number}"
    share = len(found.tensors) / max(len(first.sizes), 1)
    return "different initial weights" if share > 0.2 else f"different initial weights of {quoted(found.tensors)} only"


def cause_of_data(first: WholeRun, second: WholeRun, number: int) -> str:
    """Return why the batches differ."""
    a, b = first.updates[number], second.updates[number]
    if len(a.rows) != len(b.rows):
        return f"different batch sizes: {len(a.rows)} and {len(b.rows)} sequences in an update"
    for other in range(min(len(first.updates), len(second.updates))):
        if other != number and first.updates[other].rows == b.rows:
            words = f"update {number + 1} has the batch of the first run's update {other + 1}"
            return f"the same batches in a different order: {words}"
    return "different data"


def cause_of_gradient(first: WholeRun, second: WholeRun, a: WholeUpdate, b: WholeUpdate, found: Difference) -> str:
    """Return why gradients of the same weights, data and loss differ."""
    if a.without ^ b.without:
        return "part of the model gets no gradient in one of the runs"
    before = (
        a.accumulated if a.accumulated.norms else a.gradients,
        b.accumulated if b.accumulated.norms else b.gradients,
    )
    if factor := shared_factor(*before):
        return f"the second run's gradient is {factor:.4g} times the first run's"
    if first.dtypes != second.dtypes:
        return "precision: the runs compute in different dtypes"
    if first.processes != second.processes and len(found.tensors) < len(first.sizes) / 2:
        return f"the gradients of {quoted(found.tensors)} are not reduced over the processes"
    if first.processes != second.processes:
        return "gradients are not reduced over the processes, or are weighted differently"
    return "a different backward: the same loss gives a different gradient"
