"""Rule of the step: what an optimizer does to the weights is the closed form of the gradients it was given.

Whatever a stack does between gradient and weights shows here: clipping or rounding inside the step, another epsilon, no
bias correction, coupled weight decay, a step that stops acting. The rule works on any elements of a tensor, so 64
samples of it do; only Muon needs the whole matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conformance.checks.closed_forms import FORMS, Form, Settings, State
from conformance.errors import NotApplicable, Violation, quoted

# Of the movement of a tensor. Healthy runs in float32 show at most 2e-6, and 3e-5 where torch computes the bias
# correction in float32 (capturable). The weakest mutant, an epsilon of 1e-6 for 1e-8, shows 1e-2.
STEP_BOUND = 1e-3
# The same of 16-bit weights, whose optimizer rounds its moments and every intermediate to 8 bits: healthy 2e-2.
COARSE_BOUND = 2.0**-4
# A tensor shows nothing if rounding its weights may change this share of the movement.
BLIND = 0.25
MUON_BOUND = (0.4, 1.6)  # of the singular values of a movement; five iterations of Newton and Schulz give 0.68 to 1.14

NEUTRAL = {
    *("params", "initial_lr", "name", "foreach", "fused", "capturable", "differentiable", "max_lr", "min_lr", "swa_lr"),
    *("base_momentum", "max_momentum", "group_name", "param_names", "lr_scale", "lr_mult", "ns_coefficients"),
    *("ns_steps", "adjust_lr_fn"),
}
"""Settings that do not change what a step does."""

INEXACT = ("bitsandbytes.", "torchao.")
"""Packages whose optimizers may keep their state in 8 bits."""


@dataclass(frozen=True)
class Deviation:
    """How far the movement of some elements of one tensor is from its closed form."""

    moved: float
    """Length of the movement seen."""
    expected: float
    """Length of the movement that the closed form gives."""
    error: float
    """Length of the difference."""
    allowed: float
    """The largest error that is not a fault."""
    blind: bool
    """Rounding of the weights hides the movement, so that nothing can be said."""
    cause: str = ""
    """What explains the movement seen, if something simple does."""

    @property
    def wrong(self) -> bool:
        """Whether the movement is another one."""
        return not self.blind and not self.error <= self.allowed


def closed_form(kinds: Sequence[str], settings: Settings) -> tuple[str, Form]:
    """Return the name of an optimizer that has a closed form, and that form.

    Args:
        kinds: class paths, of the optimizer and of the classes that it derives from (its MRO).
        settings: of the tensor's group.

    Raises:
        NotApplicable: if no class bears a known name, or a class of somebody else's has settings that may matter.
    """
    if not kinds:
        raise NotApplicable("the optimizer could not be seen")
    own = kinds[0].rpartition(".")[2]
    name = next((last for path in kinds if (last := path.rpartition(".")[2]) in FORMS), None)
    if name is None:
        raise NotApplicable(f"no closed form is known of {own}: known are {', '.join(FORMS)}")
    if kinds[0].startswith(INEXACT):
        raise NotApplicable(f"{own} of {kinds[0].partition('.')[0]} may keep its state in 8 bits")
    form = FORMS[name]
    unknown = sorted(set(settings) - NEUTRAL - form.settings)
    meant = [key for key in unknown if isinstance(settings[key], bool | int | float) and settings[key]]
    if meant and not kinds[0].startswith("torch.optim."):  # a step of torch's reads none of them
        raise NotApplicable(f"{own} has settings that its closed form does not know: {', '.join(meant)}")
    return name, form


def deviation(
    kinds: Sequence[str],
    settings: Settings,
    gradient: Tensor | None,
    before: Tensor,
    after: Tensor,
    state: State,
) -> tuple[Deviation, State]:
    """Return how far one step of one tensor is from its closed form, and the state after it by the closed form.

    >>> kinds = ("torch.optim.sgd.SGD",)
    >>> deviation(kinds, {"lr": 0.5}, torch.ones(2), torch.zeros(2), -torch.ones(2) / 2, {})[0].wrong
    False

    Args:
        kinds: class paths of the optimizer and of the classes that it derives from.
        settings: of the tensor's group at this step: lr, betas, eps, weight_decay, ...
        gradient: any elements of the tensor, as the step found them (unscaled); None: there was no gradient.
        before: the same elements of the weights, before the step, in their own dtype.
        after: after the step.
        state: by torch's names (``exp_avg``, ``momentum_buffer``, ...) for these elements; empty before the first step.

    Raises:
        NotApplicable: if nothing can be said about such a step, with the reason.
    """
    name, form = closed_form(kinds, settings)
    if name == "Muon" and before.ndim != 2:
        raise NotApplicable("Muon's movement shows only in whole matrices")
    coarse = before.dtype in (torch.bfloat16, torch.float16)
    if before.dtype == torch.float16 and form.squares:
        raise NotApplicable(f"{name} on float16 weights: squares of gradients leave the range of the dtype")
    old, new = before.double(), after.double()
    if gradient is None:
        moved = (new - old).norm().item()
        return Deviation(moved, 0.0, moved, 0.0, blind=False, cause="moved without a gradient" if moved else ""), state
    torchs = any(path.startswith("torch.optim.") and path.rpartition(".")[2] == name for path in kinds)
    g = -gradient.double() if settings.get("maximize") else gradient.double()
    kept = {key: value.double() if isinstance(value, Tensor) else value for key, value in state.items()}
    if name == "Muon":
        target, following = form.predict(old, g, settings, kept)
        return muon_deviation(new - old * (1 - decay_of(settings)), target), following
    rounding = (torch.finfo(before.dtype).eps * torch.maximum(old.abs(), new.abs())).norm().item()
    best: tuple[Deviation, State] | None = None
    for variant in [{}] if torchs else form.variants:
        movement, following = form.predict(old, g, {**settings, **variant}, kept)
        found = compare(movement, new - old, rounding, COARSE_BOUND if coarse else STEP_BOUND)
        if best is None or found.error < best[0].error:
            best = found, following
    assert best is not None
    if best[0].wrong:
        rest = max(best[0].allowed, best[0].error / 10)
        words = explain(form, old, g, settings, kept, new - old, rest)
        if before.dtype == torch.float32 and bool((after == after.bfloat16()).all()) and new.any():
            words = "the weights after it are rounded to bfloat16"
        return Deviation(**{**vars(best[0]), "cause": words}), best[1]
    return best


def compare(expected: Tensor, seen: Tensor, rounding: float, bound: float) -> Deviation:
    """Return how far a movement is from the expected one; elements that are expected to be NaN may be anything."""
    sure = ~expected.isnan()
    expected, seen = expected[sure], seen[sure]
    length, error = expected.norm().item(), (seen - expected).norm().item()
    blind = length > 0 and rounding > BLIND * length
    return Deviation(seen.norm().item(), length, error, bound * length + rounding, blind)


def decay_of(settings: Settings) -> float:
    """Return by how much decoupled weight decay shrinks a weight."""
    return float(settings.get("lr", 0.0)) * float(settings.get("weight_decay", 0.0) or 0.0)


def explain(
    form: Form, old: Tensor, gradient: Tensor, settings: Settings, state: State, seen: Tensor, allowed: float
) -> str:
    """Return what explains a movement: the first simple change of the rule that predicts it, or its length."""
    if not seen.any():
        return "it did not move"
    for words, change in form.faults(settings):
        movement, _ = form.predict(old, gradient, {**settings, **change}, state)
        if (seen - movement).nan_to_num().norm().item() <= allowed:
            return words
    expected = form.predict(old, gradient, settings, state)[0].nan_to_num()
    if expected.any():
        factor = (torch.sum(seen * expected) / expected.square().sum()).item()
        if (seen - factor * expected).norm().item() <= allowed:
            return f"the movement is {factor:.4g} times as long"
    return ""


def muon_deviation(seen: Tensor, target: Tensor) -> Deviation:
    """Return how far a movement is from one that has the singular vectors of ``target`` and equal singular values.

    Directions in which ``target`` is below a hundredth of its length are left out: the iteration does not lift them.
    """
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    strong = values > 1e-2 * target.norm()
    sizes = -torch.einsum("ik,ij,kj->k", left, seen, right)[strong]
    middle = sizes.median().item() if len(sizes) else 0.0
    if not middle > 0:
        cause = "it did not move" if not seen.any() else "it does not go against the gradient"
        return Deviation(seen.norm().item(), target.norm().item(), 1.0, 0.0, not len(sizes), cause)
    ratio = sizes / middle
    worst = max(abs(ratio.max().item() - 1), abs(ratio.min().item() - 1))
    fits = bool(((ratio >= MUON_BOUND[0]) & (ratio <= MUON_BOUND[1])).all())
    cause = "" if fits else "its singular values differ: the movement is not orthogonal"
    length = middle * len(sizes) ** 0.5
    return Deviation(seen.norm().item(), length, worst * length, worst * length if fits else 0.0, False, cause)


@dataclass
class History:
    """The state of each tensor, evolved by the closed forms from its recorded gradients since the first update."""

    states: dict[str, State] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)
    """Tensors of which a movement was compared."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why nothing can be said about a tensor."""

    def follow(
        self,
        name: str,
        kinds: Sequence[str],
        settings: Settings,
        gradient: Tensor | None,
        before: Tensor,
        after: Tensor,
        state: State | None = None,
    ) -> Deviation | None:
        """Return how far a step of a tensor is from its closed form; None if nothing can be said (see ``reasons``).

        Args:
            name: of the tensor.
            kinds: as for :func:`deviation`, and so the others.
            settings: of its group.
            gradient: some of its elements, always the same ones.
            before: the same of its weights.
            after: after the step.
            state: of the optimizer before the step, where it was recorded; used for 16-bit weights, whose state is
                rounded to 16 bits at every step. None: what this history knows.
        """
        coarse = before.dtype in (torch.bfloat16, torch.float16)
        known = state if coarse and state is not None else self.states.get(name, {})
        try:
            found, self.states[name] = deviation(kinds, settings, gradient, before, after, known)
        except NotApplicable as reason:
            self.reasons[name] = str(reason)
            return None
        if found.blind:
            self.reasons[name] = "rounding of the weights hides the movement"
            return None
        self.looked.add(name)
        return found


def follows_closed_form(deviations: Mapping[str, Deviation], optimizer: str, update: int) -> None:
    """Check that in one update each tensor moved as the closed form of its optimizer says.

    Args:
        deviations: by tensor, as :meth:`History.follow` returns them.
        optimizer: name of the class, for the message.
        update: counted from 1.

    Raises:
        Violation: naming the tensors, the error, and what explains it.
    """
    wrong = {name: found for name, found in deviations.items() if found.wrong}
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name].error / (wrong[name].expected or 1.0))
        found = wrong[worst]
        share = f"{found.error / found.expected:.2g} of its length" if found.expected else f"{found.error:.2g}"
        raise Violation(
            f"in update {update} each tensor moves by the closed form of {optimizer}, from its recorded gradients",
            f"{len(wrong)} of {len(deviations)} move otherwise: {quoted(list(wrong), limit=3)}; {worst} is off by "
            f"{share}{': ' + found.cause if found.cause else ''}",
        )
