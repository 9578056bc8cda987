"""Rules of the swap from nn.Embedding to StableEmbedding and back."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.errors import Violation, quoted
from conformance.recording.trace import EmbeddingInfo, TensorInfo

STABLE = "StableEmbedding"
SMALLEST_8_BIT = 4096  # elements; bitsandbytes keeps 32-bit state for smaller tensors
OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def embedding_swap_lossless(before: nn.Embedding, after: nn.Embedding) -> None:
    """Check that a swapped embedding has the weight of the old one, bit for bit, its options, device and dtype.

    >>> table = nn.Embedding(8, 4, padding_idx=1)
    >>> embedding_swap_lossless(table, nn.Embedding(8, 4, padding_idx=1, _weight=table.weight.detach()))

    Raises:
        Violation: with what differs.
    """
    if before.weight.dtype != after.weight.dtype or before.weight.device != after.weight.device:
        raise Violation(
            f"a weight in {before.weight.dtype} on {before.weight.device}",
            f"it is in {after.weight.dtype} on {after.weight.device}",
        )
    if before.weight.shape != after.weight.shape or not torch.equal(before.weight, after.weight):
        raise Violation("the same weight, bit for bit", "the weight has changed")
    same_options({o: getattr(before, o) for o in OPTIONS}, {o: getattr(after, o) for o in OPTIONS}, "the embedding")


def same_options(before: Mapping[str, object], after: Mapping[str, object], name: str) -> None:
    """Check that the options of an embedding survive the swap.

    Raises:
        Violation: naming the options that were lost or changed.
    """
    changed = [f"{key}={after.get(key)!r}" for key in before if before[key] != after.get(key)]
    if changed:
        wanted = ", ".join(f"{key}={value!r}" for key, value in before.items())
        raise Violation(f"{name} keeps {wanted}", f"after the swap: {quoted(changed, limit=5)}")


def swapped(embeddings: Iterable[EmbeddingInfo]) -> list[str]:
    """Return the names of the StableEmbeddings."""
    return [info.name for info in embeddings if info.kind.endswith(f".{STABLE}")]


def tables_trained(before: Mapping[str, TensorInfo], after: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    """Check that the table of each StableEmbedding is trained if it was trained as a plain embedding.

    Args:
        before: tensors of the run without the swap.
        after: of the run with it.
        names: of the modules that were swapped.

    Raises:
        Violation: naming tables that are frozen.
    """
    tables = [f"{name}.weight" for name in names]
    frozen = [n for n in tables if n in before and n in after and before[n].trainable > after[n].trainable]
    if frozen:
        raise Violation("a table that is trained without the swap is trained after it", f"frozen: {quoted(frozen)}")


def norms_trained(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> None:
    """Check that the norm of each StableEmbedding is trained where its table is.

    Args:
        tensors: of the run.
        names: of the modules that were swapped.

    Raises:
        Violation: naming tensors of norms that are frozen.
    """
    frozen = [
        f"{name}.norm.{part}"
        for name in names
        for part in ("weight", "bias")
        if f"{name}.norm.{part}" in tensors
        and f"{name}.weight" in tensors
        and tensors[f"{name}.weight"].trainable > tensors[f"{name}.norm.{part}"].trainable
    ]
    if frozen:
        raise Violation("the norm of a swapped embedding is trained beside its table", f"frozen: {quoted(frozen)}")


def unlike_trained(loaded: nn.Module, trained: Mapping[str, Tensor]) -> list[str]:
    """Return what each table of a loaded model is that is not the trained one behind its trained norm.

    Args:
        loaded: with plain embeddings, named as in training.
        trained: the tensors at the end of the training, in which StableEmbeddings have norms.
    """
    found = []
    for name, module in loaded.named_modules():
        parts = [trained.get(f"{name}.{part}") for part in ("weight", "norm.weight", "norm.bias")]
        if not isinstance(module, nn.Embedding) or any(part is None for part in parts):
            continue
        table, gain, bias = (part.float() for part in parts if part is not None)
        seen, width = module.weight.detach().float(), table.shape[1:]
        if seen.shape != table.shape or close(seen, F.layer_norm(table, width, gain, bias)):
            continue
        if close(seen, table):
            what = "without its norm"
        elif close(seen, F.layer_norm(table, width)):
            what = "behind a norm that was never trained: the trained norm is lost"
        else:
            found.append(f"{name} of the loaded model is not the trained table behind its norm")
            continue
        found.append(f"{name} of the loaded model is the trained table {what}")
    return found


def close(first: Tensor, second: Tensor) -> bool:
    """Return True if two tables are the same, up to rounding."""
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def state_bits(state: Mapping[str, Mapping[str, object]], tensors: Mapping[str, TensorInfo], wide: set[str]) -> None:
    """Check that state has 32 bits for the tensors in ``wide``, and 8 bits for every other large tensor.

    Raises:
        Violation: naming tensors with the wrong width.
    """
    wrong = []
    for name, info in tensors.items():
        elements = torch.Size(info.shape).numel()
        if not info.trainable or elements < SMALLEST_8_BIT:
            continue
        moments = [v for v in state.get(name, {}).values() if isinstance(v, Tensor) and v.numel() == elements]
        expected = torch.float32 if name in wide else torch.uint8
        if not moments or any(moment.dtype != expected for moment in moments):
            found = ", ".join(str(moment.dtype).removeprefix("torch.") for moment in moments) or "no state"
            wrong.append(f"{name} has {found}")
    if wrong:
        listed = f"32-bit state for {', '.join(sorted(wide))}, 8-bit state for every other" if wide else ""
        raise Violation(f"{listed or '8-bit state for every'} large tensor", quoted(wrong))
