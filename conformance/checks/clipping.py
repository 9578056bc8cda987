"""Rules of gradient clipping."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from conformance.checks.accumulation import gradients_agree, named_gradients, total_norm
from conformance.errors import Violation, quoted

# Of the gradient vector, relative to its length. Healthy runs show 1e-6, which torch adds to the norm it divides by.
# The weakest mutant, clipping after each microbatch, shows 0.88.
CLIP_BOUND = 1e-4
COARSE_BOUND = 1e-2  # the same of gradients in 16 bits, whose elements are rounded once more: healthy 2e-3


def clipped_as_one(
    free: Mapping[str, Tensor | None],
    clipped: Mapping[str, Tensor | None],
    limit: float,
    bound: float = CLIP_BOUND,
    shared: Collection[str] = (),
    where: str = "",
) -> None:
    """Check that clipping scales the whole gradient, all tensors together, to the limit.

    Args:
        free: the gradient of the same update without clipping, longer than the limit.
        clipped: as it reached the optimizer.
        limit: largest global norm.
        bound: of the length of the vector.
        shared: tensors that have several names.
        where: begins the message.

    Raises:
        Violation: with the kind of clipping that the gradient looks like, the relative error and the lengths.
    """
    factor = limit / total_norm(free)
    expected = {name: None if gradient is None else gradient.double() * factor for name, gradient in free.items()}
    try:
        gradients_agree(expected, clipped, f"{where}the gradient clipped to a global norm of {limit:g}", bound)
    except Violation as error:
        before, after = named_gradients(free), named_gradients(clipped)
        if set(before) != set(after):
            raise
        kind = kind_of_clipping(before, after, limit, shared)
        raise Violation(error.expected, f"{kind}: {error.seen}") from None


def kind_of_clipping(
    free: Mapping[str, Tensor], clipped: Mapping[str, Tensor], limit: float, shared: Collection[str] = ()
) -> str:
    """Return what was done to a gradient instead of clipping it as a whole, as far as the two gradients tell.

    Args:
        free: the gradient without clipping, in float64.
        clipped: the same tensors, as they reached the optimizer.
        limit: largest global norm.
        shared: tensors that have several names.
    """
    lengths = {name: (free[name].norm().item(), clipped[name].norm().item()) for name in free}
    lengths = {name: (before, after) for name, (before, after) in lengths.items() if before > 1e-9 * total_norm(free)}
    factors = {name: after / before for name, (before, after) in lengths.items()}

    def close(one: float, other: float) -> bool:
        return abs(one - other) <= COARSE_BOUND * abs(other)

    if not factors or not all(after < float("inf") for _, after in lengths.values()):
        return "not a gradient that was clipped, but one that is zero or not finite"
    if any((clipped[name] - free[name] * factors[name]).norm() > COARSE_BOUND * lengths[name][1] for name in factors):
        if all(torch.allclose(clipped[n], free[n].clamp(-limit, limit), rtol=COARSE_BOUND) for n in factors):
            return "each element was clipped by itself"
        if close(total_norm(clipped), limit):
            return "clipped to the limit, but not once and as a whole: as if it was clipped after each microbatch"
        return "not clipped once and as a whole: as if it was clipped before the last backward, which added to it"
    if all(close(factor, 1.0) for factor in factors.values()):
        return "not clipped when the optimizer steps: the limit is ignored, or applied after the step"
    if all(close(after, min(before, limit)) for before, after in lengths.values()):
        return "each tensor was clipped by itself"
    if not close(max(factors.values()), min(factors.values())):
        parts = [name for name in factors if close(factors[name], next(iter(factors.values())))]
        some = f"{quoted(parts, limit=3)} together" if len(parts) > 1 else parts[0]
        return f"parts of the model were clipped apart, by norms of their own: {some}, and others"
    counted = limit / max(factors.values())
    twice = sum(before**2 * (2 if name in shared else 1) for name, (before, _) in lengths.items()) ** 0.5
    if shared and close(counted, twice):
        return f"clipped as if the norm was {counted:.4g}: the tied tensor {quoted(shared)} was counted twice"
    if close(counted, sum(before for before, _ in lengths.values())):
        return f"clipped as if the norm was {counted:.4g}, the sum of the norms of all tensors"
    return f"clipped as if the norm was {counted:.4g}; it is {total_norm(free):.4g}"


def all_finite(tensors: Mapping[str, Tensor], when: str) -> None:
    """Check that no element is NaN or infinite.

    Raises:
        Violation: naming the tensors.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise Violation(
            "an error, or a skipped update: the parameters stay finite",
            f"{when} {len(bad)} of {len(tensors)} tensors hold NaN or infinity: {quoted(bad)}",
        )


def states_are_numbers(states: Mapping[str, Mapping[str, object]], when: str) -> None:
    """Check that no optimizer state of a tensor, given by its name, holds a NaN.

    An optimizer that steps by the sign of its momentum (Lion) leaves the weights finite: sign(NaN) is 0. Infinities may
    be where a state begins, as a maximum does.

    Raises:
        Violation: naming the states.
    """
    bad = [
        f"{key} of {name}"
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any()
    ]
    if bad:
        raise Violation(
            "an error, or an update that is left out: the optimizer's state stays free of NaN",
            f"{when} the optimizer's state holds NaN in {len(bad)} places: {quoted(bad)}",
        )
