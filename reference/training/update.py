"""One update: from batches to a loss in nats per token, its gradient, and the same loss for validation."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.model.initialization import derive_seed

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
        batch = on_device(batch, device)
        return batch[:, :-1], batch[:, 1:]
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(map(is_tokens, batch)):
        ids, targets = (on_device(part, device) for part in batch)
        if ids.shape == targets.shape:
            return ids, targets
    form = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
    raise TrainingError(
        f"a batch has the form {form}: expected integer token ids (B, T + 1), or a pair of ids and targets."
    )


def within_vocabulary(batches: Iterable[Batch], vocabulary: int) -> Iterator[Batch]:
    """The batches, each looked at for token ids that the model has no row for, unless it lies on a GPU already.

    There an id too many ends in an assertion of the device, which names neither the id nor the batch.

    Raises:
        TrainingError: for ids or targets that are not in 0 to ``vocabulary`` - 1, but for the target -100.
    """
    for batch in batches:
        for number, part in enumerate(batch if isinstance(batch, tuple | list) else (batch,)):
            if not is_tokens(part) or part.device.type != "cpu":
                continue
            values = part[part != IGNORE] if number else part
            low, high = (int(value) for value in values.aminmax()) if values.numel() else (0, 0)
            if low < 0 or high >= vocabulary:
                raise TrainingError(
                    f"a batch holds the token id {low if low < 0 else high}, but the model knows 0 to "
                    f"{vocabulary - 1}: tokenize the text with the model's tokenizer, or set vocab_size higher."
                )
        yield batch


def on_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Token ids as int64 on the device, without waiting for it."""
    if device.type == "cuda" and tokens.device.type == "cpu":
        # NOTE a footgun: a copy from pageable memory waits for all that the GPU has to do, non_blocking or not.
        tokens = tokens.pin_memory()
    return tokens.to(device=device, dtype=torch.long, non_blocking=True)


def is_tokens(value: Any) -> TypeGuard[Tensor]:
    """Whether this is a tensor of integers with two dimensions, neither of them empty."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.numel() > 0 and not value.is_floating_point()


def count_targets(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The number of targets that count, of this rank's microbatches: a scalar on their device, int64."""
    return torch.stack([(targets != IGNORE).sum() for _, targets in pairs]).sum()


def accumulate(fabric: "Fabric", model: Any, pairs: list[tuple[Tensor, Tensor]], count: Tensor) -> Tensor:
    """Forward and backward over the microbatches of one update.

    Each loss is a sum divided by the number of target tokens of the whole update, over all microbatches and ranks.
    So k microbatches give the gradient of one large batch also where they have different numbers of targets; the
    mean of their means does not (transformers#34191).

    Args:
        fabric: with the strategy and the precision.
        model: as set up by Fabric; with a :class:`TokenLoss` inside where it was compiled.
        pairs: token ids and targets, (B, T) each, one pair per microbatch.
        count: targets of the whole update, over all microbatches and ranks.

    Returns:
        This rank's share of the loss in nats per token, a scalar on the device; the mean over the ranks is the loss.
    """
    # DDP averages gradients over ranks; we want their sum over the common count.
    scale = fabric.world_size / count.clamp(min=1)
    total = torch.zeros((), device=fabric.device)
    for index, (ids, targets) in enumerate(pairs):
        # NOTE a footgun: both forward and backward must be inside, DDP decides at forward (build-nanogpt#30).
        with fabric.no_backward_sync(model, enabled=index + 1 < len(pairs)):
            loss = batch_loss(model, ids, targets) * scale
            fabric.backward(loss)
        total += loss.detach()
    return total


class TokenLoss(nn.Module):
    """A model and its loss as one module, (B, T) ids and targets to a scalar: for torch.compile.

    With the loss inside the compiled graph the float32 logits are never written to memory: for GPT-2's vocabulary
    they are 13 GB of a microbatch of 64 x 1024 tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """See :func:`token_loss`."""
        return token_loss(self.model(ids), targets)


def batch_loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of a batch, from a model with or without its loss inside."""
    if isinstance(getattr(model, "module", model), TokenLoss):  # Fabric's wrapper shows the module it was given
        return model(ids, targets)
    return token_loss(model(ids), targets)


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

    Raises:
        TrainingError: if the model gave anything but such logits.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TrainingError(
            f"the model gave {form} for targets {tuple(targets.shape)}: it must map token ids (B, T) to logits "
            "(B, T, V), a single tensor."
        )
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def clip(fabric: "Fabric", model: Any, optimizer: Any, limit: float | None) -> Tensor:
    """Clip the global gradient norm, if there is a limit, and return what it was: a scalar on the device."""
    # An infinite limit multiplies by exactly 1; the norm is wanted in any case, to stop a run that has gone wrong.
    norm = fabric.clip_gradients(model, optimizer, max_norm=limit or float("inf"), error_if_nonfinite=False)
    assert norm is not None
    return norm


def require_finite(fabric: "Fabric", update: int, values: list[float], share: Tensor, saved: str) -> None:
    """Raise TrainingError if the loss or the gradient norm of an update is NaN or infinite.

    Not under a loss scaler (16-mixed): it meets such gradients on purpose, and skips the step by itself.

    Args:
        fabric: whose ranks all come here with the same values.
        update: number of the update, from 0.
        values: loss and gradient norm over all ranks; more is ignored.
        share: this rank's own part of the loss, which tells where it went wrong.
        saved: what there is to resume from, for the message.
    """
    loss, norm, *_ = values
    if (math.isfinite(loss) and math.isfinite(norm)) or getattr(fabric.strategy.precision, "scaler", None) is not None:
        return
    what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
    broken = torch.zeros(fabric.world_size, device=share.device)
    broken[fabric.global_rank] = not share.isfinite()
    ranks = [str(rank) for rank, here in enumerate(reduce(fabric, broken, "sum").tolist()) if here]
    raise TrainingError(
        f"the {what} is {value} at update {update + 1} on rank {', '.join(ranks) or fabric.global_rank}; the "
        f"parameters are those of the update before, and {saved}. Lower the learning rate or lengthen the warm-up, "
        "and resume."
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
            sums[0] += batch_loss(model, ids, targets)
            sums[1] += (targets != IGNORE).sum()
    sums = reduce(fabric, sums, "sum")
    if sums[1] == 0:
        raise TrainingError(
            "there are no validation batches (an iterator gives them only once): give a list, a DataLoader or another "
            "iterable that can be read again, or set evaluate_every=None."
        )
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
