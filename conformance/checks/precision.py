"""Rules of precision."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.errors import Violation, quoted

# Relative. Healthy runs show at most 1e-7 (the order of summation); losses computed in bfloat16, 5e-5 to 1e-2.
LOSS_BOUND = 1e-5
# Absolute, on cos and sin: one rounding of a finished table to bfloat16 is at most 2^-9 (0.00195 is seen). A phase
# computed in bfloat16 is off by 0.04 at 64 positions, and by 2 at 2048.
TABLE_BOUND = 2.0**-8
COMPILED_BOUND = 1e-2  # of the movement of each tensor; measured in the clause
MOVEMENT_BOUND = 0.5  # of the float32 run's movement; healthy 0.99 to 1.02, lost to rounding 0.05 and less


def loss_in_float32(logits: Tensor, targets: Tensor, loss: Tensor) -> None:
    """Check that a loss is the float32 cross entropy of the logits it was computed from, in value and dtype.

    >>> logits, targets = torch.randn(1, 3, 8), torch.tensor([[1, 2, 3]])
    >>> loss_in_float32(logits, targets, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    Args:
        logits: (B, T, V), any floating dtype.
        targets: (B, T), int64; -100 is ignored.
        loss: scalar, the mean over the targets.

    Raises:
        Violation: with both values.
    """
    if loss.dtype not in (torch.float32, torch.float64):
        raise Violation("a loss in float32", f"{loss.dtype}")
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()
    if not abs(loss.item() - expected) <= LOSS_BOUND * abs(expected):
        raise Violation(
            f"the loss {expected:.6f}, the float32 cross entropy of the logits (relative bound {LOSS_BOUND:g})",
            f"{loss.item():.6f}, a relative error of {abs(loss.item() - expected) / abs(expected):.1e}",
        )


def shared_factor(pairs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Return the factor between the losses and the cross entropies of their logits; 1 if it is close to 1.

    Args:
        pairs: logits (B, T, V), targets (B, T) and loss, at least two of each.
    """
    entropies = [F.cross_entropy(logits.double().flatten(0, 1), t.flatten()).item() for logits, t, _ in pairs]
    factors = sorted(loss.item() / entropy for (_, _, loss), entropy in zip(pairs, entropies, strict=True))
    middle = factors[len(factors) // 2]
    return middle if abs(middle - 1) > 1e-2 else 1.0


def content_is(logits: Sequence[Tensor], rounded: bool) -> None:
    """Check that logits were computed in float32, and not in bfloat16 and then converted.

    Raises:
        Violation: if every value of every tensor is a bfloat16 number (or, with ``rounded``, if any is not).
    """
    coarse = all(torch.equal(t.float(), t.bfloat16().float()) for t in logits)
    if coarse and not rounded:
        raise Violation(
            "logits computed in float32", "every value is a bfloat16 number, so they were computed in bfloat16"
        )
    if rounded and not coarse:
        raise Violation("logits computed in bfloat16", "some values are not bfloat16 numbers")


def dtypes_are(dtypes: Mapping[str, torch.dtype], expected: torch.dtype, what: str) -> None:
    """Check that all tensors have one dtype.

    Raises:
        Violation: naming those that have another.
    """
    wrong = [f"{name} in {dtype}" for name, dtype in dtypes.items() if dtype != expected]
    if wrong:
        raise Violation(f"{what} in {expected}", quoted(wrong))


def tables_close(exact: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    """Check that tables of a 16-bit model are those of the float32 model, rounded once.

    Raises:
        Violation: naming the table and its largest error.
    """
    for name, table in exact.items():
        if table.is_floating_point() and name in seen and table.shape == seen[name].shape:
            error = (seen[name].double() - table.double()).abs().max().item()
            if not error <= TABLE_BOUND:
                raise Violation(
                    f"the table {name} of the bfloat16 model within 2^-8 of the float32 one", f"off by {error:.3g}"
                )


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return how far all elements moved, added up."""
    return float(sum((after[name].double() - before[name].double()).abs().sum().item() for name in before))


def moved_alike(start: Mapping[str, Tensor], expected: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    """Check that two runs from the same weights moved each tensor to the same place, relative to how far it moved.

    A tensor that moves less than a thousandth of all together is measured by that: its gradient may be all rounding, as
    that of the bias of keys is, on which no logit depends.

    Raises:
        Violation: with the tensor that is farthest off, or the names that only one of them has.
    """
    if set(expected) != set(seen):
        raise Violation("the same tensors", f"only in one of them: {quoted(sorted(set(expected) ^ set(seen)))}")
    floating = [name for name, tensor in expected.items() if tensor.is_floating_point() and name in start]
    moves = {name: distance(start[name], expected[name]) for name in floating}
    least = 1e-3 * sum(move**2 for move in moves.values()) ** 0.5
    off = {name: distance(expected[name], seen[name]) / max(moves[name], least, 1e-30) for name in floating}
    worst = max(off, key=lambda name: off[name] if off[name] == off[name] else float("inf"))
    if not off[worst] <= COMPILED_BOUND:
        raise Violation(
            f"every tensor where it ends without torch.compile, within {COMPILED_BOUND:.0%} of its movement",
            f"{worst} is off by {off[worst]:.1%} of its movement; "
            f"{sum(not ratio <= COMPILED_BOUND for ratio in off.values())} of {len(off)} tensors are off",
        )


def distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference of two tensors."""
    return float((one.double() - other.double()).norm())


def holds_only(tensor: Tensor, narrow: torch.dtype) -> bool:
    """Return True for a float32 tensor of many different values, all of them numbers of a 16-bit dtype.

    A few values may be such numbers by chance, and ones and zeros are by nature.
    """
    if tensor.dtype != torch.float32 or tensor.numel() < 64:
        return False
    return torch.equal(tensor, tensor.to(narrow).float()) and len(tensor.unique()) > 16


def starts_not_rounded(exact: Mapping[str, Tensor], seen: Mapping[str, Tensor], narrow: torch.dtype) -> None:
    """Check that float32 weights of a run that computes in 16 bits start with more than numbers of 16 bits.

    Args:
        exact: weights that a run in float32 starts from: where those are such numbers too, the stack means it.
        seen: those of the other run.
        narrow: the dtype that it computes in.

    Raises:
        Violation: naming tensors that hold such numbers only.
    """
    names = [name for name in exact if name in seen and not holds_only(exact[name], narrow)]
    rounded = [name for name in names if holds_only(seen[name], narrow)]
    if rounded:
        raise Violation(
            "float32 weights that start with float32 values, as in a run under 32-true",
            f"{len(rounded)} of {len(names)} tensors start with {short(narrow)} numbers alone: {quoted(rounded)}",
        )


def not_rounded(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    later: Mapping[str, Tensor],
    when: str,
    narrow: torch.dtype = torch.bfloat16,
) -> None:
    """Check that float32 tensors which an update has moved still hold more than 16-bit numbers at the next.

    Args:
        before: tensors before the update.
        after: after it.
        later: before the next.
        when: that is, for the message.
        narrow: the 16-bit dtype.

    Raises:
        Violation: naming tensors that hold 16-bit numbers only.
    """
    moved = [name for name in later if not torch.equal(before[name], after[name])]
    rounded = [name for name in moved if holds_only(later[name], narrow)]
    if rounded:
        raise Violation(
            f"float32 values in float32 weights {when}",
            f"{len(rounded)} of {len(later)} tensors hold {short(narrow)} numbers alone: {quoted(rounded)}",
        )


def gradients_not_rounded(
    gradients: Mapping[str, Tensor | None], narrow: torch.dtype, what: str = "a float32 gradient"
) -> None:
    """Check that a gradient which was added up in float32 holds more than 16-bit numbers.

    What one microbatch gives to a matrix may be 16-bit numbers by nature, under autocast; the sum of several is not.

    >>> gradients_not_rounded({"weight": torch.randn(8, 16)}, torch.bfloat16)

    Args:
        gradients: of an update, by tensor.
        narrow: the 16-bit dtype.
        what: they are, for the message.

    Raises:
        Violation: naming tensors whose gradient holds 16-bit numbers only.
    """
    given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    rounded = [name for name, gradient in given.items() if holds_only(gradient, narrow)]
    if rounded:
        raise Violation(
            f"float32 values in {what}",
            f"the gradients of {len(rounded)} of {len(given)} tensors hold {short(narrow)} numbers alone: "
            f"{quoted(rounded)}",
        )


def short(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
