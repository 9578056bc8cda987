"""Rules of what is minimised: the cross entropy of the next tokens, and nothing else."""

from collections.abc import Sequence
from statistics import fmean

from conformance.errors import Violation

# Of the cross entropy. Healthy runs show 1e-7; the weakest mutant, a z-loss of 1e-5 of the squared normaliser, 5e-5.
TERM_BOUND = 1e-5
LARGEST_FACTOR = 2048  # by which a stack may scale its loss: a number of microbatches, of tokens in a batch, and so on


def nothing_else(losses: Sequence[float], entropies: Sequence[float]) -> None:
    """Check that losses are the cross entropies times one whole number (or divided by one), with no further term.

    Only a term that all losses share is one: what differs from loss to loss, up and down, is rounding.

    >>> nothing_else([2.0, 4.0], [1.0, 2.0])

    Args:
        losses: on which backward was called.
        entropies: the mean cross entropy of each, computed in float64.

    Raises:
        Violation: with the size of the term.
    """
    ratio = sorted(loss / entropy for loss, entropy in zip(losses, entropies, strict=True))[len(losses) // 2]
    if ratio <= 0:
        raise Violation(
            "a loss that is the cross entropy, up to a factor", f"it is {ratio:.4g} times the cross entropy"
        )
    factor = float(round(ratio)) if ratio >= 1 else 1 / round(1 / ratio)
    if max(factor, 1 / factor) > LARGEST_FACTOR:
        return  # whole numbers lie so close there that every factor is one
    rest = [loss / factor - entropy for loss, entropy in zip(losses, entropies, strict=True)]
    middle, spread = abs(fmean(rest)), max(rest) - min(rest)
    # A loss that counts other tokens is off by a factor, which explains it better than a term does: that is ACC-5's.
    scaled = [loss / ratio - entropy for loss, entropy in zip(losses, entropies, strict=True)]
    if max(scaled) - min(scaled) <= spread:
        return
    if spread < middle and middle > TERM_BOUND * fmean(entropies):
        raise Violation(
            f"the loss is the cross entropy and has no other term, within {TERM_BOUND:g} of it",
            f"a term of {fmean(rest):+.3g} beside a cross entropy of {fmean(entropies):.4f}, in all {len(rest)} losses",
        )
