"""A run that is set up: the model, its optimizer and Fabric, one update at a time."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.checkpoint import folder as checkpoint
from reference.checkpoint.resume import gathered, restore
from reference.config import GPTConfig, TrainConfig, as_plain
from reference.model.initialization import derive_seed
from reference.optimizers.build import optimizer_state
from reference.training.launch import is_sharded
from reference.training.schedule import learning_rate
from reference.training.stopping import Stop
from reference.training.update import (
    Batch,
    accumulate,
    clip,
    count_targets,
    evaluate,
    reduce,
    repeat,
    require_finite,
    split_targets,
    within_vocabulary,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("reference")

Pairs = list[tuple[Tensor, Tensor]]


@runtime_checkable
class TokenSource(Protocol):
    """Batches that can begin anywhere and are split over ranks, such as reference.data.tokens.TokenData."""

    def batches_from(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """Token ids (B, T + 1) without end, from microbatch ``start`` of this rank on."""

    def once(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and targets (B, T), each target once over all ranks, as many batches on each rank."""


@dataclass
class Run:
    """What :meth:`reference.Trainer.setup` gives: all that one update needs."""

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
    stopping: bool = False
    """Whether a signal asked any rank to stop, as all ranks saw it when the last update began."""
    sequences: int = 0
    """Sequences of the last update, over all ranks."""
    saved: str = "there is no checkpoint yet"
    """What there is to resume from, for messages."""

    def batches(self, train: "Iterable[Batch] | TokenSource", done: int) -> Iterator[Batch]:
        """This rank's microbatches, without end, from the first that ``done`` updates have not consumed."""
        start = done * self.config.microbatches
        if isinstance(train, TokenSource):
            return train.batches_from(start, self.fabric.global_rank, self.fabric.world_size)
        return itertools.islice(self.checked(repeat(train, self.config.seed, self.fabric.global_rank)), start, None)

    def checked(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches, checked for ids that a GPT has no row for. Of other models the vocabulary is not known."""
        config = getattr(self.module, "config", None)
        return within_vocabulary(batches, config.vocab_size) if isinstance(config, GPTConfig) else batches

    def fetch(self, batches: Iterator[Batch]) -> Pairs:
        """The microbatches of the next update, on their way to the device."""
        return [split_targets(b, self.fabric.device) for b in itertools.islice(batches, self.config.microbatches)]

    def update_once(self, update: int, pairs: Pairs, batches: Iterator[Batch] | None = None) -> "Done":
        """Update number ``update`` (from 0): accumulate, clip, step.

        Args:
            update: decides learning rate and dropout.
            pairs: its microbatches, ids and targets (B, T) each.
            batches: where the next microbatches come from. They are fetched while the device computes.

        Raises:
            TrainingError: if loss or gradient is not finite; the parameters are untouched then.
        """
        config, fabric = self.config, self.fabric
        self.sequences = self.count_sequences(pairs)
        for group, peak in zip(self.bare.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(
                update,
                peak=peak,
                updates=config.updates,
                schedule=config.schedule,
                warmup=config.warmup,
                minimum=config.min_lr,
                cooldown=config.cooldown,
            )
        # Dropout is a function of seed, update and rank, so a resumed run draws what it would have drawn.
        seed_dropout(derive_seed(config.seed, update, fabric.global_rank), fabric.device)
        # All ranks must stop at the same update, whichever got the signal; the count of targets is shared anyway.
        # NOTE a footgun: torch.tensor(value, device="cuda") waits for all that the GPU has to do; full() does not.
        asked = torch.full((), int(self.stop.signal is not None), device=fabric.device)
        shared = reduce(fabric, torch.stack((count_targets(pairs), asked)), "sum")
        share = accumulate(fabric, self.wrapped, pairs, shared[0])
        following = [] if batches is None else self.fetch(batches)
        norm = clip(fabric, self.wrapped, self.optimizer, config.clip)
        loss = reduce(fabric, share.clone(), "mean")
        wide = torch.float32 if fabric.device.type == "mps" else torch.float64  # MPS has no float64
        seen = Seen(torch.cat((torch.stack((loss, norm.to(loss.dtype))).to(wide), shared.to(wide))))
        guarded = guard(self.bare, seen.finite)
        if not guarded:
            require_finite(fabric, update, seen.values, share, self.saved)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if guarded:  # the host waits only now, when the device has the step to do, which did nothing if not finite
            require_finite(fabric, update, seen.values, share, self.saved)
        loss_value, norm_value, tokens, stopping = seen.values
        self.stopping = stopping > 0
        return Done(loss_value, norm_value, int(tokens), following)

    def must_stop(self) -> bool:
        """Whether the run ends here; the same on all ranks."""
        return self.stopping or (self.fabric.world_size == 1 and self.stop.signal is not None)

    def evaluate(self, validation: "Iterable[Batch] | TokenSource") -> float:
        """Mean cross entropy in nats per token over the validation batches of all ranks."""
        batches: Iterable[Batch]
        if isinstance(validation, TokenSource):
            batches = validation.once(self.fabric.global_rank, self.fabric.world_size)
        else:
            batches = self.checked(validation)
        return evaluate(self.fabric, self.wrapped, itertools.islice(batches, self.config.evaluate_batches))

    def save(self, update: int, tokenizer: str | Path | None = None) -> None:
        """Write the checkpoint after ``update`` updates, from rank 0, and wait for it on every rank.

        Args:
            update: number of updates done.
            tokenizer: that the tokens come from: ``bytes``, or its file, which is kept beside the weights.
        """
        weights: Any = self.module
        packed: dict[str, Any] = {}
        if is_sharded(self.fabric):
            weights, packed = gathered(self.wrapped._forward_module, self.bare)
            # Gathered, a tied tensor comes once for each of its names.
            weights |= {name: weights[first] for name, first in self.ties.items() if first in weights}
        folder = checkpoint.step_folder(self.directory, update)

        def write() -> None:
            state = {
                "update": update,
                "optimizer": packed or optimizer_state(self.bare),
                "optimizer_class": self.config.optimizer,
                "precision": self.fabric.strategy.precision.state_dict(),
                "stable_embedding": any(type(m).__name__ == "StableEmbedding" for m in self.module.modules()),
            }
            model_config = getattr(self.module, "config", None)
            plain: dict[str, Any] = {"train": as_plain(self.config), "sequences_per_update": self.sequences}
            if isinstance(model_config, GPTConfig):
                plain["model"] = as_plain(model_config)
            files = {"tokenizer.json": tokenizer} if isinstance(tokenizer, Path) else {}
            plain["tokenizer"] = "tokenizer.json" if files else tokenizer
            checkpoint.save(folder, weights, state, plain, files)
            checkpoint.prune(self.directory, self.config.keep_last, folder)

        self.on_rank_zero(write)
        self.saved = f"the newest checkpoint is {folder}"

    def count_sequences(self, pairs: Pairs) -> int:
        """Sequences of an update over all ranks, whose microbatches are taken to be as large as this rank's."""
        return self.fabric.world_size * sum(len(ids) for ids, _ in pairs)

    def warn_about_order(self, folder: Path, pairs: Pairs) -> None:
        """Say so if updates consume more or fewer sequences than before a checkpoint, which keeps updates only.

        Args:
            folder: the checkpoint.
            pairs: the microbatches of the next update.
        """
        before, now = checkpoint.load_config(folder).get("sequences_per_update"), self.count_sequences(pairs)
        if before is not None and before != now:
            logger.warning(
                "resume: an update has %d sequences now, and had %d before %s: the place in the data is counted in "
                "updates, so some sequences of this epoch are %s",
                now,
                before,
                folder,
                "left out" if now > before else "seen again",
            )

    def on_rank_zero(self, function: Callable[[], None]) -> None:
        """Call a function on rank 0 and wait for it on every rank.

        Raises:
            CheckpointError: on every rank, if it raised one there. The others would wait for rank 0 forever.
        """
        failure = None
        if self.fabric.global_rank == 0:
            try:
                function()
            except checkpoint.CheckpointError as error:
                failure = error
        failed = reduce(self.fabric, torch.tensor(float(failure is not None), device=self.fabric.device), "sum")
        if failed > 0:
            raise failure or checkpoint.CheckpointError("rank 0 could not write checkpoints; its message says why.")

    def restore(self, folder: Path) -> int:
        """Load a checkpoint; the number of updates it has done."""
        root = self.wrapped._forward_module if is_sharded(self.fabric) else None
        done = restore(folder, self.fabric, self.module, self.bare, self.config, root)
        newer = [path.name for path in checkpoint.checkpoints(self.directory) if checkpoint.number(path) > done]
        if newer:
            logger.warning(
                "resume: %s holds newer checkpoints than %s, up to %s: they stay, and resume='auto' would take them",
                self.directory,
                folder.name,
                newer[-1],
            )
        self.saved = f"the newest checkpoint is {folder}"
        return done


def seed_dropout(seed: int, device: torch.device) -> None:
    """As ``torch.manual_seed``, but only the generators of the CPU and of this device.

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

    def __init__(self, numbers: Tensor) -> None:
        """Begin the copy.

        Args:
            numbers: the four, on the device.
        """
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
    """Have a fused CUDA optimizer do nothing if ``finite`` is false; whether it can.

    Its kernels look at ``found_inf`` themselves, as they do for a loss scaler. So the step can be launched before the
    host knows, and the device need not wait for the host.
    """
    if finite.device.type != "cuda" or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined] # torch's own attribute, set by its scaler
    return True


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
