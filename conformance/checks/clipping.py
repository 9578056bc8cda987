"""Rules of gradient clipping."""

from collections.abc import Mapping

from torch import Tensor

from conformance.checks.accumulation import gradients_agree, total_norm
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
) -> None:
    """Check that clipping scales the whole gradient, all tensors together, to the limit.

    Args:
        free: the gradient of the same update without clipping, longer than the limit.
        clipped: as it reached the optimizer.
        limit: largest global norm.
        bound: of the length of the vector.

    Raises:
        Violation: with the relative error and the lengths.
    """
    factor = limit / total_norm(free)
    expected = {name: None if gradient is None else gradient.double() * factor for name, gradient in free.items()}
    gradients_agree(expected, clipped, f"the gradient scaled to a global norm of {limit:g}", bound)


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
