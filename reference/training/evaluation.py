"""The loss of a run on data that is not trained on."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from reference.config import IGNORE
from reference.data.tokens import Batch
from reference.errors import TrainingError
from reference.model.loss import batch_loss
from reference.model.modes import evaluation_mode
from reference.optimizers.averages import averaged
from reference.training.batches import TokenSource, split_targets, within_vocabulary
from reference.training.launch import reduce
from reference.training.run import Run

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def validate(run: Run, validation: Iterable[Batch] | TokenSource) -> float:
    """Return the mean cross entropy in nats per token over the validation batches of all ranks."""
    batches: Iterable[Batch]
    if isinstance(validation, TokenSource):
        batches = validation.once(run.fabric.global_rank, run.fabric.world_size)
    else:
        batches = within_vocabulary(validation, run.module)
    with averaged(run.bare):
        return evaluate(run.fabric, run.wrapped, itertools.islice(batches, run.config.evaluate_batches))


@torch.no_grad()
def evaluate(fabric: "Fabric", model: Any, batches: Iterable[Batch]) -> float:
    """Return the mean cross entropy in nats per target token over all batches and ranks, in eval mode.

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
