"""One update: from batches to a loss in nats per token, its gradient, and the same loss for validation."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.initialize import derive_seed

if TYPE_CHECKING:
    from lightning.fabric import Fabric

IGNORE = -100  # a target with this value counts neither in the loss nor in its mean
Batch = Tensor | tuple[Tensor, Tensor]
"""Token ids (B, T + 1), or ids (B, T) and targets (B, T)."""


class TrainingError(RuntimeError):
    """A run that cannot go on: the message names the update, what happened and what to do."""


def repeat(batches: Iterable[Batch], seed: int, rank: int) -> Iterator[Batch]:
    """The batches over and over. Each pass is seeded by its number: a shuffling DataLoader repeats its order.

    Raises:
        TrainingError: if a pass gives none.
    """
    for epoch in itertools.count():
        torch.manual_seed(derive_seed(seed, "epoch", epoch, rank))
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise TrainingError(
                "the training batches ended: give a list, a DataLoader or another iterable that can be read again."
            )


def split_targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch as token ids (B, T) and targets (B, T), int64, on ``device``.

    Raises:
        TrainingError: if the batch has another form.
    """
    if is_tokens(batch) and batch.size(1) >= 2:
        batch = batch.to(device=device, dtype=torch.long, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(map(is_tokens, batch)):
        ids, targets = (part.to(device=device, dtype=torch.long, non_blocking=True) for part in batch)
        if ids.shape == targets.shape:
            return ids, targets
    form = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
    raise TrainingError(
        f"a batch has the form {form}: expected integer token ids (B, T + 1), or a pair of ids and targets."
    )


def is_tokens(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a tensor of integers with two dimensions."""
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()


def accumulate(fabric: "Fabric", model: Any, batches: list[Batch]) -> tuple[float, int]:
    """Forward and backward over the microbatches of one update.

    Each loss is a sum divided by the number of target tokens of the whole update, over all microbatches and ranks.
    So k microbatches give the gradient of one large batch also where they have different numbers of targets; the
    mean of their means does not (transformers#34191).

    Returns:
        The loss in nats per token and the number of target tokens, over all ranks.
    """
    pairs = [split_targets(batch, fabric.device) for batch in batches]
    count = torch.stack([(targets != IGNORE).sum() for _, targets in pairs]).sum()
    count = reduce(fabric, count, "sum")
    # DDP averages gradients over ranks; we want their sum over the common count.
    scale = fabric.world_size / count.clamp(min=1)
    total = torch.zeros((), device=fabric.device)
    for index, (ids, targets) in enumerate(pairs):
        # NOTE a footgun: both forward and backward must be inside, DDP decides at forward (build-nanogpt#30).
        with fabric.no_backward_sync(model, enabled=index + 1 < len(pairs)):
            loss = token_loss(model(ids), targets) * scale
            fabric.backward(loss)
        total += loss.detach()
    total = reduce(fabric, total, "mean")
    return total.item(), int(count)


def reduce(fabric: "Fabric", tensor: Tensor, operation: Literal["sum", "mean"]) -> Tensor:
    """A tensor summed or averaged over all ranks; as it is on a single one."""
    reduced = fabric.all_reduce(tensor, reduce_op=operation) if fabric.world_size > 1 else tensor
    assert isinstance(reduced, Tensor)
    return reduced


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies in nats, in float32 whatever the logits' dtype.

    In bfloat16 the loss itself would be rounded, to steps of 0.06 around 11 (Modalities#464).

    Args:
        logits: (B, T, V), floating.
        targets: (B, T), int64; -100 is ignored.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def clip(fabric: "Fabric", model: Any, optimizer: Any, limit: float | None, update: int) -> float:
    """Clip the global gradient norm, if there is a limit, and return what it was.

    Raises:
        TrainingError: if it is not finite. The parameters are untouched then.
    """
    # An infinite limit multiplies by exactly 1; the norm is wanted in any case, to stop a run that has gone wrong.
    unlimited = float("inf")
    norm = fabric.clip_gradients(model, optimizer, max_norm=limit or unlimited, error_if_nonfinite=False)
    assert norm is not None
    require_finite("gradient norm", norm.item(), fabric, update)
    return norm.item()


def require_finite(what: str, value: float, fabric: "Fabric", update: int) -> None:
    """Raise TrainingError, before the step, if a value is NaN or infinite.

    Not under a loss scaler (16-mixed): it meets such gradients on purpose, and skips the step by itself.
    """
    if not math.isfinite(value) and getattr(fabric.strategy.precision, "scaler", None) is None:
        raise TrainingError(
            f"the {what} is {value} at update {update + 1} on rank {fabric.global_rank}; the parameters are those of "
            "the update before. Lower the learning rate or lengthen the warm-up, and resume."
        )


@torch.no_grad()
def evaluate(fabric: "Fabric", model: Any, batches: Iterable[Batch]) -> float:
    """Mean cross entropy in nats per target token over all batches and ranks, in eval mode.

    Raises:
        TrainingError: if there are no batches.
    """
    with evaluation_mode(model):
        sums = torch.zeros(2, dtype=torch.float64, device="cpu" if fabric.device.type == "mps" else fabric.device)
        for batch in batches:
            ids, targets = split_targets(batch, fabric.device)
            sums[0] += token_loss(model(ids), targets)
            sums[1] += (targets != IGNORE).sum()
    sums = reduce(fabric, sums, "sum")
    if sums[1] == 0:
        raise TrainingError("there are no validation batches: give some, or set evaluate_every=None.")
    return float(sums[0] / sums[1])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and afterwards the mode that each submodule had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
