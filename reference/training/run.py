"""One update from top to bottom: batches, forward, loss, backward, clip, step."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.config import TrainConfig
from reference.data.stream import TextStream
from reference.data.tokens import Batch
from reference.errors import TrainingError
from reference.finetuning.config import FinetuneConfig
from reference.model.initialization import derive_seed
from reference.model.loss import batch_loss
from reference.training.batches import (
    Pairs,
    TokenSource,
    count_targets,
    repeat,
    split_targets,
    within_vocabulary,
)
from reference.training.launch import reduce
from reference.training.schedule import learning_rate
from reference.training.stopping import Stop

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class Done:
    """What one update gave."""

    loss: float
    """Mean cross entropy in nats per token, over all microbatches and ranks."""
    gradient_norm: float
    """Global L2 norm before clipping."""
    tokens: int
    """Targets, over all ranks."""
    following: Pairs
    """The microbatches of the next update, if they were to be fetched."""


@dataclass
class Run:
    """A run that is set up (reference.training.setup): all that one update needs."""

    config: TrainConfig
    fabric: "Fabric"
    module: nn.Module
    """The module that is trained, without Fabric's and torch.compile's wrappers."""
    wrapped: Any
    """The module as Fabric set it up, compiled together with its loss if so configured."""
    bare: Optimizer
    """The optimizer."""
    optimizer: Any
    """The optimizer as Fabric set it up."""
    peaks: list[float]
    """Learning rate of each parameter group, before the schedule."""
    directory: Path
    """Where checkpoints go."""
    stop: Stop
    """Whether a signal asked this process to stop."""
    ties: dict[str, str]
    """For each further name of a tied tensor, the first."""
    launches_early: bool = False
    """Whether a forward does not involve the strategy. Under DDP and FSDP it decides what backward will exchange."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """What is frozen, quantised and added."""
    changes: list[str] = field(default_factory=list)
    """What changes the function of the weights that it started from, in words."""
    stopping: bool = False
    """Whether a signal asked any rank to stop, as all ranks saw it when the last update began."""
    sequences: int = 0
    """Sequences of the last update, over all ranks."""
    saved: str = "there is no checkpoint yet"
    """What there is to resume from, for messages."""
    early: Tensor | None = None
    """Loss of the next update's only microbatch, if its forward was launched already."""

    def batches(self, train: Iterable[Batch] | TokenSource, done: int) -> Iterator[Batch]:
        """Yield this rank's microbatches, without end, from the first that ``done`` updates have not consumed."""
        start = done * self.config.microbatches
        if isinstance(train, TokenSource):
            if isinstance(train, TextStream):  # it may wait for long
                train.ended = lambda: self.stop.signal is not None
            return self.unending(train.batches_from(start, self.fabric.global_rank, self.fabric.world_size))
        endless = within_vocabulary(repeat(train, self.config.seed, self.fabric.global_rank), self.module)
        return itertools.islice(endless, start, None)

    def unending(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of a token source.

        Raises:
            TrainingError: if they end, and no signal told a stream of text to wait no longer.
        """
        yield from batches
        if self.stop.signal is None:
            raise TrainingError(
                "the training batches ended: batches_from() of a token source must yield batches without end."
            )

    def fetch(self, batches: Iterator[Batch]) -> Pairs:
        """Take the microbatches of the next update, and send them on their way to the device."""
        return [split_targets(b, self.fabric.device) for b in itertools.islice(batches, self.config.microbatches)]

    def update_once(
        self, update: int, pairs: Pairs, batches: Iterator[Batch] | None = None, at_once: bool = False
    ) -> Done:
        """Do update number ``update`` (from 0).

        Args:
            update: decides learning rate and dropout.
            pairs: its microbatches, from :meth:`fetch`.
            batches: where the next microbatches come from. They are fetched while the device computes.
            at_once: whether the next update follows at once, with the microbatches fetched here. Its forward may then
                be launched before the host waits for the figures of this one, so that the device has work meanwhile.

        Raises:
            TrainingError: if loss or gradient is not finite; the parameters are untouched then.
        """
        config, fabric, device = self.config, self.fabric, self.fabric.device
        self.sequences = self.count_sequences(pairs)
        for group, peak in zip(self.bare.param_groups, self.peaks, strict=True):
            set_rate(group, learning_rate(config, update, peak))
        # Dropout is a function of seed, update and rank, so a resumed run draws what it would have drawn.
        seed_dropout(derive_seed(config.seed, update, fabric.global_rank), device)

        # Each loss is a sum over tokens, divided by the targets of the whole update, over all microbatches and ranks.
        # So k microbatches give the gradient of one large batch also where they have different numbers of targets; the
        # mean of their means does not (transformers#34191).
        # All ranks must stop at the same update, whichever got the signal: it travels with the count.
        # NOTE a footgun: torch.tensor(value, device="cuda") waits for all that the GPU has to do; full() does not.
        asked = torch.full((), int(self.stop.signal is not None), device=device)
        shared = reduce(fabric, torch.stack((count_targets(pairs), asked)), "sum")
        scale = fabric.world_size / shared[0].clamp(min=1)  # DDP averages gradients over ranks; we want their sum

        early, self.early = self.early, None
        share = torch.zeros((), device=device)  # this rank's part; the mean over the ranks is the loss
        for index, (ids, targets) in enumerate(pairs):
            # NOTE a footgun: both forward and backward must be inside, DDP decides at forward (build-nanogpt#30).
            with fabric.no_backward_sync(self.wrapped, enabled=index + 1 < len(pairs)):
                loss = batch_loss(self.wrapped, ids, targets) * scale if early is None else early * scale
                fabric.backward(loss)
            share += loss.detach()
        following = [] if batches is None else self.fetch(batches)

        # An infinite limit multiplies by exactly 1; the norm is wanted in any case, to stop a run that has gone wrong.
        limit = config.clip or float("inf")
        norm = fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        assert norm is not None

        seen = Seen(reduce(fabric, share.clone(), "mean"), norm, shared)
        guarded = guard(self.bare, seen.finite)
        if not guarded:
            self.require_finite(update, seen.values, share)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if guarded:  # the host waits only now, when the device has the step to do, which did nothing if not finite
            if at_once and len(following) == 1 and self.launches_early:
                seed_dropout(derive_seed(config.seed, update + 1, fabric.global_rank), device)
                self.early = batch_loss(self.wrapped, *following[0])
            self.require_finite(update, seen.values, share)
        loss_value, norm_value, tokens, stopping = seen.values
        self.stopping = stopping > 0
        return Done(loss_value, norm_value, int(tokens), following)

    def require_finite(self, update: int, values: list[float], share: Tensor) -> None:
        """Raise TrainingError on every rank if the loss or the gradient norm of an update is NaN or infinite.

        Not under a loss scaler (16-mixed): it meets such gradients on purpose, and skips the step by itself. ``values``
        begin with loss and norm over all ranks; ``share``, this rank's own part, tells where it went wrong.
        """
        (loss, norm, *_), fabric = values, self.fabric
        scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        if (math.isfinite(loss) and math.isfinite(norm)) or scaled:
            return
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        broken = torch.zeros(fabric.world_size, device=share.device)
        broken[fabric.global_rank] = not share.isfinite()
        ranks = [str(rank) for rank, here in enumerate(reduce(fabric, broken, "sum").tolist()) if here]
        raise TrainingError(
            f"the {what} is {value} at update {update + 1} on rank {', '.join(ranks) or fabric.global_rank}; the "
            f"parameters are those of the update before, and {self.saved}. Lower the learning rate or lengthen the "
            "warm-up, and resume."
        )

    def count_sequences(self, pairs: Pairs) -> int:
        """Return the sequences of an update over all ranks, whose microbatches are taken to be as large as here."""
        return self.fabric.world_size * sum(len(ids) for ids, _ in pairs)


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a parameter group, in place if it is a tensor, as torchao's optimizers demand."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed as ``torch.manual_seed`` does, but only the generators of the CPU and of this device.

    That function seeds every kind of accelerator that there is, and for each that was never used it writes down where
    it was called from: 0.3 ms before the first kernel of every update.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


class Seen:
    """Numbers of an update, on their way to the host: loss, gradient norm, targets, and whether to stop."""

    def __init__(self, loss: Tensor, norm: Tensor, shared: Tensor) -> None:
        """Begin the copy of scalars on the device, and of the pair ``shared``."""
        wide = torch.float32 if loss.device.type == "mps" else torch.float64  # MPS has no float64
        numbers = torch.cat((torch.stack((loss, norm.to(loss.dtype))).to(wide), shared.to(wide)))
        self.finite = numbers[:2].isfinite().all()
        self.event = torch.cuda.Event() if numbers.device.type == "cuda" else None
        self.copy = numbers
        if self.event is not None:
            self.copy = torch.empty(4, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
            self.event.record()

    @property
    def values(self) -> list[float]:
        """The numbers. Waits until the device has computed them, and for nothing that it was given to do since."""
        if self.event is not None:
            self.event.synchronize()
        return self.copy.tolist()


def guard(optimizer: Optimizer, finite: Tensor) -> bool:
    """Have a fused CUDA optimizer do nothing if ``finite`` is false, and return whether it can.

    Its kernels look at ``found_inf`` themselves, as they do for a loss scaler. So the step can be launched before the
    host knows, and the device need not wait for the host.
    """
    if finite.device.type != "cuda" or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined] # torch's own attribute, set by its scaler
    return True
