"""Rules of fine-tuning: what stays frozen, what is trained, and by how much the first loss may move unsaid."""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.trace import TensorInfo

# Nats per token. A run that starts from the same float32 weights shows 0; nf4 weights move it by 1.7e-3,
# StableEmbedding by 0.16, adapters that start as noise by 0.98.
UNSAID = 1e-4
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:[eE][-+]?\d+)?")  # not whole ones: they count updates
MOVING = re.compile(r"mov|chang|differ|rais|lower|increas|decreas", re.IGNORECASE)
INTEGERS = (torch.uint8, torch.int8)


def has_adapters(before: Collection[str], tensors: Collection[str]) -> None:
    """Raise NotApplicable if a run that was to fine-tune has no tensors but those that it came from.

    Args:
        before: names of the tensors of the run that it starts from.
        tensors: of the run itself.
    """
    if set(tensors) <= set(before):
        raise NotApplicable(
            "the run has no adapters, although the recipe asked for LoRA: if the stack has no such option, the adapter "
            "must name finetune in lacks"
        )


def quantised(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the names of the tensors that are packed into integers.

    Raises:
        Violation: if there are none, or one of them is trainable.
    """
    packed = [name for name, info in tensors.items() if info.dtype in INTEGERS]
    if not packed:
        kinds = sorted({str(info.dtype).removeprefix("torch.") for info in tensors.values()})
        raise Violation("weights in 4 or 8 bits, as the recipe asks for", f"tensors in {', '.join(kinds)} only")
    if trainable := [name for name in packed if tensors[name].trainable]:
        raise Violation("weights in 4 or 8 bits are frozen", f"trainable: {quoted(trainable)}")
    return packed


def frozen_alike(plain: Iterable[str], stable: Iterable[str], embeddings: Collection[str]) -> None:
    """Check that a swap of embeddings makes nothing trainable but the embeddings.

    Args:
        plain: names of the tensors that are trained without the swap.
        stable: with it.
        embeddings: names of the modules that were swapped.

    Raises:
        Violation: naming tensors that were frozen and are not, or the reverse.
    """
    inside = tuple(f"{name}." for name in embeddings)
    new = [name for name in set(stable) - set(plain) if not name.startswith(inside)]
    lost = sorted(set(plain) - set(stable))
    if new or lost:
        seen = f"trained only with it: {quoted(sorted(new)) or 'none'}; only without: {quoted(lost) or 'none'}"
        raise Violation("the same tensors are trained with and without StableEmbedding, but for the embedding", seen)


def base_frozen(tensors: Mapping[str, TensorInfo], base: Collection[str], embeddings: Iterable[str]) -> None:
    """Check that no tensor of the model that a run starts from is trained, but those of embeddings.

    Args:
        tensors: of the run, whose names may have something before those of the base.
        base: names of the tensors of the model that it starts from.
        embeddings: names of the run's embeddings; what lies in one may be trained.

    Raises:
        Violation: naming tensors that are trained.
    """
    inside = tuple(f"{name}." for name in embeddings)
    trained = [
        name
        for name, info in tensors.items()
        if info.trainable
        and not name.startswith(inside)
        and any(name == known or name.endswith(f".{known}") for known in base)
    ]
    if trained:
        raise Violation("the model's own tensors are frozen, but for embeddings", f"trained: {quoted(trained)}")


def same_first_loss(before: float, after: float, messages: Iterable[str]) -> None:
    """Check that the first loss of a run is that of the model it started from, or that a message says how it moves.

    >>> same_first_loss(2.5, 2.5, [])
    >>> same_first_loss(2.5, 2.61, ["the loss moves by +0.11"])

    Args:
        before: loss of the model, in nats per token.
        after: first loss of the run, on the same tokens.
        messages: what the run printed or logged.

    Raises:
        Violation: if it moves and nothing says so.
    """
    moved = after - before
    if abs(moved) <= UNSAID:
        return
    if not any(tells(message, before, after) for message in messages):
        raise Violation(
            f"a first loss of {before:.4f}, that of the model that the run starts from, or a message that says by how "
            "much it moves",
            f"{after:.4f}, which is {moved:+.4f}, and no message about it",
        )


def tells(message: str, before: float, after: float) -> bool:
    """Return True if a message speaks of a loss, and has both values of it, or says that it moves and by how much.

    Numbers are taken to be right if they are within a twentieth of the difference, or rounded to four digits.
    """
    if "loss" not in message.lower():
        return False
    numbers = [float(number) for number in NUMBER.findall(message)]
    most = max(0.05 * abs(after - before), 6e-5)

    def has(value: float) -> bool:
        return any(abs(number - value) <= most for number in numbers)

    return (has(before) and has(after)) or (MOVING.search(message) is not None and has(after - before))


def storage(tensors: Mapping[str, TensorInfo], declared: torch.dtype) -> None:
    """Check that trained tensors are kept in the declared dtype or in float32.

    Raises:
        Violation: naming tensors in another.
    """
    wrong = [
        f"{name} in {str(info.dtype).removeprefix('torch.')}"
        for name, info in tensors.items()
        if info.trainable and info.dtype not in (declared, torch.float32)
    ]
    if wrong:
        raise Violation(f"trained tensors in {str(declared).removeprefix('torch.')} or float32", quoted(wrong))


def relative_difference(expected: Tensor, seen: Tensor) -> float:
    """Return the norm of a difference over that of what was expected."""
    return float((seen.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
