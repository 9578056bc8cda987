"""Rules of the gradient of one update, however it is split into microbatches and over ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from conformance.errors import Violation, quoted

# Of the whole gradient vector, relative to its length. Healthy runs show at most 1.4e-7 (another order of summation);
# the weakest mutant, the mean of means over ragged microbatches, 0.27.
GRADIENT_BOUND = 1e-5
# Between the fall of the loss and what the gradient predicts, relative. Healthy runs show at most 1.4e-4 (the third
# order of the step); dividing by 17 tokens in place of 16 is 5.9e-2.
SCALE_BOUND = 5e-3

Gradients = Mapping[str, Tensor | None]


def gradients_agree(
    expected: nn.Module | Gradients,
    seen: nn.Module | Gradients,
    what: str = "the gradient",
    bound: float = GRADIENT_BOUND,
) -> None:
    """Check that two gradients are the same vector, up to the order of summation.

    >>> model = nn.Linear(2, 2)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> gradients_agree(model, model)

    Args:
        expected: a module, of which ``grad`` is taken, or gradients by name; None where there is none.
        seen: the same of the other.
        what: what they are, for the message.
        bound: largest error, relative to the length of the vector.

    Raises:
        Violation: with the relative error, the ratio of the lengths, and the tensors that differ most.
    """
    first, second = named_gradients(expected), named_gradients(seen)
    if set(first) != set(second):
        lost = sorted(set(first) ^ set(second))
        raise Violation(f"{what}: gradients of the same tensors", f"only one of them has {quoted(lost)}")
    length = total_norm(first) or total_norm(second)
    if not length:
        return  # no tensor has a gradient other than 0, in both
    errors = {name: (second[name] - first[name]).norm().item() / length for name in first}
    error = sum(value**2 for value in errors.values()) ** 0.5
    if not error <= bound:
        worst = sorted(errors, key=lambda name: -errors[name])
        ratio = total_norm(second) / length
        raise Violation(
            f"{what}: the same vector, within {bound:g} of its length",
            f"off by {error:.2g} of its length, and {ratio:.4g} times as long; most of it in {quoted(worst, limit=3)}",
        )


def named_gradients(source: nn.Module | Gradients) -> dict[str, Tensor]:
    """Return the gradients in float64, by name, of all tensors that have one."""
    gradients = {n: p.grad for n, p in source.named_parameters()} if isinstance(source, nn.Module) else source
    return {name: gradient.double() for name, gradient in gradients.items() if gradient is not None}


def total_norm(gradients: Mapping[str, Tensor | None]) -> float:
    """Return the length of the vector that all gradients form together."""
    return float(sum(g.double().square().sum().item() for g in gradients.values() if g is not None)) ** 0.5


def gradient_is_of(
    losses: tuple[float, float],
    moved: Mapping[str, Tensor],
    gradients: tuple[Gradients, Gradients],
    what: str = "the gradient",
) -> None:
    """Check that a gradient is that of the loss itself, neither a multiple of it nor a part.

    The loss before and after a step differs by the step times the mean of the gradients before and after, up to the
    third order of the step. Where a stack fixes its own step and it is large, that order counts: it grows with the
    square of the gradient's change (Lion at 1e-3: changed by 0.33, off by 0.041), and the bound with it.

    Args:
        losses: before and after a small step, on the same batch, in float64 or as exact as can be.
        moved: by how much each tensor was moved.
        gradients: before and after.
        what: what they are, for the message.

    Raises:
        Violation: with the factor.
    """
    factor, bound = scale_of(losses, moved, gradients, what)
    if not abs(factor - 1) <= bound:
        raise Violation(
            "the gradient of the mean cross entropy over the target tokens: over a small step, the loss falls as much "
            f"as the gradient predicts, within {bound:.2g}",
            f"{what} is {factor:.4g} times as large as that",
        )


def scale_of(
    losses: tuple[float, float], moved: Mapping[str, Tensor], gradients: tuple[Gradients, Gradients], what: str
) -> tuple[float, float]:
    """Return how many times as large a gradient is as that of the loss itself, and how exactly the step tells it.

    The arguments are those of :func:`gradient_is_of`.

    Raises:
        Violation: if the loss does not change, or is not predicted to.
    """
    first, second = named_gradients(gradients[0]), named_gradients(gradients[1])
    before, after = (sum(torch.sum(moved[name].double() * g[name]).item() for name in first) for g in (first, second))
    predicted = (before + after) / 2
    if not predicted or losses[0] == losses[1]:
        raise Violation(
            "a step along the gradient lowers the loss", f"{what} predicts no change, or the loss does not change"
        )
    return predicted / (losses[1] - losses[0]), max(SCALE_BOUND, ((after - before) / predicted) ** 2 / 2)
