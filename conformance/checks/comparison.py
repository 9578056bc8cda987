"""Bit equality of named tensors: the rule behind half of the clauses."""

from collections.abc import Mapping

from torch import Tensor

from conformance.errors import Violation, quoted
from conformance.recording.snapshot import bits_equal, equal_values


def tensors_equal(expected: Mapping[str, Tensor], seen: Mapping[str, Tensor], what: str) -> None:
    """Raise Violation unless two sets of named tensors are the same, bit for bit, in names, shapes and dtypes."""
    if set(expected) != set(seen):
        lost, new = sorted(set(expected) - set(seen)), sorted(set(seen) - set(expected))
        raise Violation(
            f"{what}: the same tensors", f"missing {quoted(lost) or 'none'}; additional {quoted(new) or 'none'}"
        )
    different = [name for name in expected if not same(expected[name], seen[name])]
    if different:
        first = different[0]
        raise Violation(
            f"{what}: equal bit for bit",
            f"{len(different)} of {len(expected)} tensors differ: {quoted(different)}; "
            f"{first} by up to {largest_difference(expected[first], seen[first])}",
        )


def same(first: Tensor, second: Tensor) -> bool:
    """Return True if shape, dtype and content agree."""
    return first.shape == second.shape and first.dtype == second.dtype and bits_equal(first, second)


def largest_difference(first: Tensor, second: Tensor) -> str:
    """Return the largest absolute difference, or what keeps it from being computed."""
    if first.shape != second.shape:
        return f"shape {tuple(first.shape)} against {tuple(second.shape)}"
    if first.dtype != second.dtype:
        return f"dtype {first.dtype} against {second.dtype}"
    return f"{(first.double() - second.double()).abs().max().item():.3g}"


def states_equal(
    expected: Mapping[str, Mapping[str, object]], seen: Mapping[str, Mapping[str, object]], what: str
) -> None:
    """Raise Violation unless two optimizer states, by tensor and entry, are equal bit for bit."""
    lost = [name for name in expected if name not in seen]
    if lost:
        raise Violation(
            f"{what}: entries for all {len(expected)} tensors", f"{len(lost)} tensors have none: {quoted(lost)}"
        )
    different = [
        f"{name}[{key!r}]"
        for name, entries in expected.items()
        for key, value in entries.items()
        if key not in seen[name] or not equal_values(value, seen[name][key])
    ]
    if different:
        raise Violation(
            f"{what}: equal bit for bit", f"{len(different)} entries differ or are gone: {quoted(different)}"
        )
