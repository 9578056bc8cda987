"""Rules of dropout: on in training, with another mask each time, and off everywhere else."""

from torch import Tensor

from conformance.checks.comparison import largest_difference
from conformance.errors import Violation

# Of the root mean square of the logits. Healthy runs show 0, and up to 1e-6 where a batch is put together otherwise;
# the weakest mutant, a dropout of 0.1 on one residual branch, 0.1.
SAME_FUNCTION = 1e-4


def masks_differ(first: Tensor, second: Tensor, what: str) -> None:
    """Check that logits of the same tokens at the same weights differ, as dropout makes them.

    Args:
        first: of any shape.
        second: of the same shape, with another mask.
        what: between which the mask must differ.

    Raises:
        Violation: if they are equal bit for bit.
    """
    if bool((first == second).all()):
        raise Violation(
            f"dropout draws another mask for {what}", "the logits of equal tokens are equal: the same mask, or none"
        )


def same_function(expected: Tensor, seen: Tensor, what: str, bound: float = SAME_FUNCTION) -> None:
    """Check that two sets of logits come from the same function, up to the order of summation.

    Args:
        expected: of any shape.
        seen: of the same shape.
        what: whose they are.
        bound: of the root mean square of ``expected``.

    Raises:
        Violation: with the largest difference.
    """
    size = expected.double().square().mean().sqrt().item()
    if not (expected.double() - seen.double()).abs().max().item() <= bound * size:
        raise Violation(
            f"{what}: the same logits, within {bound:g} of their size",
            f"they differ by up to {largest_difference(expected.double(), seen.double())}, of a size of {size:.3g}",
        )
