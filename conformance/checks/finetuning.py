"""Rules of fine-tuning: what stays frozen, what is trained, and by how much the first loss may move unsaid."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from conformance.errors import NotApplicable, Violation, quoted
from conformance.recording.snapshot import find_logits
from conformance.recording.trace import TensorInfo

# Nats per token. A run that starts from the same float32 weights shows 0; nf4 weights move it by 1.7e-3,
# StableEmbedding by 0.16, adapters that start as noise by 0.98.
UNSAID = 1e-4
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:[eE][-+]?\d+)?")  # not whole ones: they count updates
MOVING = re.compile(r"mov|chang|differ|rais|lower|increas|decreas", re.IGNORECASE)
NUMBERED = re.compile(r"\.\d+\.")
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


def adapted_everywhere(base: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that beside every linear layer of the blocks something is trained.

    Args:
        base: tensors of the model that a run starts from.
        tensors: of the run, whose names may have something before those of the base, and something between the name of
            a layer and that of its weight.

    Raises:
        Violation: naming layers that have no adapter.
    """
    # A matrix in a block, of which there are several with a number each, is the weight of a linear layer.
    layers = [
        name.removesuffix(".weight")
        for name, info in base.items()
        if len(info.shape) == 2 and name.endswith(".weight") and NUMBERED.search(name)
    ]
    inside = {layer: [info for name, info in tensors.items() if f".{layer}." in f".{name}"] for layer in layers}
    if bare := [layer for layer, found in inside.items() if found and not any(info.trainable for info in found)]:
        raise Violation(
            f"an adapter beside each of {len(layers)} linear layers of the blocks",
            f"none beside {len(bare)} of them: {quoted(bare)}",
        )


def other_than_base(base: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors of a run's start that are not those of the model that it starts from.

    Args:
        base: tensors of that model.
        start: of the run, whose names may have something before those of the base; what is packed is left out.
    """
    return [
        name
        for name, tensor in start.items()
        for known, value in base.items()
        if (name == known or name.endswith(f".{known}"))
        and tensor.shape == value.shape
        and tensor.is_floating_point()
        and not torch.equal(tensor, value.to(tensor.dtype))
    ]


def same_first_loss(
    before: float, after: float, messages: Iterable[str], changed: Callable[[], Sequence[str]] = tuple
) -> None:
    """Check that the first loss of a run is that of the model it started from, or that a message says how it moves.

    >>> same_first_loss(2.5, 2.5, [])
    >>> same_first_loss(2.5, 2.61, ["the loss moves by +0.11"])

    Args:
        before: loss of the model, in nats per token.
        after: first loss of the run, on the same tokens.
        messages: what the run printed or logged.
        changed: finds the tensors that are not those of the model, for the message.

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
            f"{after:.4f}, which is {moved:+.4f}, and no message about it"
            + (f"; not those of that model: {quoted(names)}" if (names := changed()) else ""),
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


def other_scale(loaded: nn.Module, trained: Mapping[str, Tensor], ids: Tensor, logits: Tensor) -> str:
    """Return by which other scale adapters would have to be merged for a loaded model to be the trained one.

    LoRA adds scale * B @ A to a weight (arXiv:2106.09685); scale is alpha / rank, or alpha / sqrt(rank)
    (arXiv:2312.03732). Empty if no scale explains it. The loaded model is used up: its weights are moved.

    Args:
        loaded: the model.
        trained: tensors of the training run at its end, with adapters.
        ids: (B, T).
        logits: what the trained model gave for them.
    """
    weights, moves = dict(loaded.named_parameters()), list[tuple[Tensor, Tensor, float]]()
    for name, down in trained.items():
        prefix, found, rest = name.partition(".lora_A")
        up, base = trained.get(f"{prefix}.lora_B{rest}"), trained.get(f"{prefix}.base_layer.weight")
        target = next((w for known, w in weights.items() if prefix.endswith(known.removesuffix(".weight"))), None)
        if not found or up is None or base is None or target is None or base.shape != target.shape:
            continue
        delta = up.float() @ down.float()
        delta = delta if delta.shape == target.shape else delta.T
        used = float(((target.detach() - base) * delta).sum() / delta.square().sum().clamp(min=1e-30))
        moves.append((target, delta, used))
    if not moves:
        return ""
    rank = min(trained[name].shape[0] for name in trained if ".lora_A" in name)
    scale, before = moves[0][2], 1.0
    with torch.no_grad():
        for factor in (rank**0.5, rank**-0.5, float(rank), 1 / rank, 2.0, 0.5):
            for weight, delta, used in moves:
                weight += delta * used * (factor - before)
            before = factor
            seen = find_logits(loaded(ids))
            if seen is not None and relative_difference(logits, seen) <= 1e-4:
                return f": the adapters are merged with a scale of {scale:.3g}, but trained with {scale * factor:.3g}"
    return ""


def relative_difference(expected: Tensor, seen: Tensor) -> float:
    """Return the norm of a difference over that of what was expected."""
    return float((seen.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
