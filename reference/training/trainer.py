"""The training loop: set up, update, evaluate, save, stop, resume."""

import datetime
import logging
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from reference import checkpoint
from reference.config import GPTConfig, TrainConfig
from reference.data.tokens import Batch
from reference.errors import ConfigurationError
from reference.finetuning.config import FinetuneConfig
from reference.model.embedding import restore_embeddings
from reference.model.gpt import GPT
from reference.optimizers.averages import averaged, to_average
from reference.training.batches import TokenSource, require_tokenizer, require_vocabulary
from reference.training.evaluation import validate
from reference.training.float8 import plain_linears, require_tokens
from reference.training.launch import is_sharded
from reference.training.run import Run
from reference.training.saving import on_rank_zero, restore, save, tell_of_schedule, warn_about_order
from reference.training.setup import ModelSource, set_up
from reference.training.starting import (
    announce,
    base_folder,
    load_base,
    require_same_ids,
    resumed_finetuning,
    started_from,
)
from reference.training.stopping import Stop, stop_on_signals
from reference.training.throughput import device_peak, flops_per_token

logger = logging.getLogger("reference")

Callback = Callable[["Record"], None]
Sampler = Callable[[nn.Module, int], None]
"""Shows what a model generates: takes the module, as it is trained, and the number of updates done."""


@dataclass(frozen=True)
class Record:
    """What one update did."""

    update: int
    """Updates done, this one included."""
    loss: float
    """Mean cross entropy in nats per token over all microbatches and ranks of the update."""
    learning_rate: float
    """Of this update, in the first parameter group."""
    gradient_norm: float
    """Global L2 norm before clipping."""
    tokens: int
    """Target tokens of this update, over all ranks."""
    validation_loss: float | None = None
    """Mean cross entropy over the validation batches, if they were evaluated after this update."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time of the update: from one step of the optimizer to the next, without evaluation and saving."""
    memory: int = field(default=0, compare=False)
    """Most bytes allocated on this rank's GPU so far; 0 on the CPU."""


@dataclass
class FitResult:
    """What a run leaves: the trained module, its optimizer, and one Record per update."""

    model: nn.Module
    """The module as it was trained, without Fabric's and torch.compile's wrappers."""
    optimizer: torch.optim.Optimizer
    records: list[Record] = field(default_factory=list)
    stopped: signal.Signals | None = None
    """The signal that ended the run before its last update, after a checkpoint was written."""

    def for_inference(self) -> nn.Module:
        """Return a copy in eval mode with plain embeddings."""
        return plain_linears(restore_embeddings(self.model))


class Trainer:
    """Trains any module that maps token ids (B, T) to logits (B, T, V).

    Args:
        model: a GPTConfig; or a function that builds a module, so that it is built on the right device, in the
            right dtype and after seeding; or a module, which is taken as it is; or None, if the shape comes from the
            checkpoint that ``fit`` starts from.
        config: how to train.
        directory: where checkpoints go.
        callbacks: functions called with the Record of every update, on every rank.
        finetune: what to freeze, quantise and add; nothing by default. A resumed run has it from its checkpoint.
        sample: called every ``sample_every`` updates on rank 0, with plain linear layers. It must leave the random
            state, the modes and the gradients as they are, as reference.model.generation does.
    """

    def __init__(
        self,
        model: ModelSource | None,
        config: TrainConfig | None = None,
        directory: str | Path = "out",
        callbacks: Iterable[Callback] = (),
        finetune: FinetuneConfig | None = None,
        sample: Sampler | None = None,
    ) -> None:
        self.model = model
        self.config = config or TrainConfig()
        self.directory = Path(directory)
        self.callbacks = tuple(callbacks)
        self.finetune = finetune or FinetuneConfig()
        self.sample = sample

    def fit(
        self,
        train: Iterable[Batch] | TokenSource,
        validation: Iterable[Batch] | TokenSource | None = None,
        resume: bool | Literal["auto"] | str | Path = False,
        init_from: str | Path | None = None,
    ) -> FitResult:
        """Train to the last update and return what the run leaves.

        Ctrl-C, SIGTERM or SIGHUP end the run after the update that is running, with a checkpoint, and ``stopped`` in
        the result says so; a second one acts at once.

        Args:
            train: a TokenData; or batches of token ids (B, T + 1), or pairs of ids and targets (B, T)
                where a target of -100 is ignored, which are read from their start again when they end. TokenData
                gives each rank its part; of other batches, each rank gives its own.
            validation: the same; all of it, or the first ``evaluate_batches``, is evaluated each time.
            resume: False, True (newest checkpoint in ``directory``), ``auto`` (newest, if any) or a path. The
                batches that were consumed before are skipped.
            init_from: start from the weights of this checkpoint, or of the newest in a run's directory, with a fresh
                optimizer and from update 0. It is not read if ``resume`` finds a checkpoint.

        Raises:
            ConfigurationError: if the settings cannot work.
            CheckpointError: if a checkpoint is missing, damaged or of another model.
            TrainingError: if a loss or gradient is not finite, or a source of batches gives none.
        """
        config = self.config
        folder = checkpoint.find(resume, self.directory)
        base = load_base(init_from) if folder is None and init_from is not None else None
        with stop_on_signals() as stop, ExitStack() as held:
            run = self.setup(stop, folder, base, init_from)
            require_vocabulary(run.module, train, validation)
            if folder is not None:
                require_tokenizer(folder, train)
            elif init_from is not None:
                require_same_ids(base_folder(init_from), train)
            done = restore(run, folder) if folder is not None else 0
            if done >= config.updates:
                logger.warning(
                    "resume: %s has done %d updates, and updates=%d: nothing is left to train",
                    *(folder, done, config.updates),
                )
            if config.save_every is not None:  # now, rather than after hours of training
                on_rank_zero(run, lambda: checkpoint.require_writable(self.directory))
            on_rank_zero(run, lambda: checkpoint.require_alone(self.directory, held))
            if validation is not None and config.evaluate_every is None:
                logger.info("validation: batches were given, but evaluate_every is None: they are not evaluated")
            samples_at_all = self.sample is not None and config.sample_every is not None
            if samples_at_all and is_sharded(run.fabric):
                raise ConfigurationError(
                    "sample_every cannot be used with the strategy fsdp, where no rank has a whole model: leave it "
                    "out, and use 'python -m reference generate' on a checkpoint."
                )
            result = FitResult(run.module, run.bare)
            batches, device = run.batches(train, done), run.fabric.device
            upcoming = run.fetch(batches) if done < config.updates else []
            if done < config.updates and len(upcoming) < config.microbatches:  # a stream was told to wait no longer
                result.stopped = stop.signal
                return result
            if config.float8 != "none":
                require_tokens(upcoming)
            if folder is not None and upcoming:
                tell_of_schedule(run, folder)
                warn_about_order(run, folder, upcoming)
            if base is not None and init_from is not None:
                announce(run, base, upcoming, init_from)
                base = None  # its memory is wanted
            began = started = time.perf_counter()
            for update in range(done, config.updates):
                last = update + 1 == config.updates
                validates = validation is not None and is_due(update, config.evaluate_every, last)
                saves = is_due(update, config.save_every, last)
                samples = samples_at_all and is_due(update, config.sample_every, last)
                did = run.update_once(update, upcoming, None if last else batches, not (validates or saves or samples))
                upcoming = did.following
                now = time.perf_counter()
                validation_loss = None
                if validates and validation is not None:
                    validation_loss = validate(run, validation)
                record = Record(
                    update=update + 1,
                    loss=did.loss,
                    learning_rate=float(run.bare.param_groups[0]["lr"]),
                    gradient_norm=did.gradient_norm,
                    tokens=did.tokens,
                    validation_loss=validation_loss,
                    seconds=now - started,
                    memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
                )
                result.records.append(record)
                for callback in self.callbacks:
                    callback(record)
                if is_due(update, config.log_every, last) or update == done:
                    passed = time.perf_counter() - began
                    log(record, run, passed / (update + 1 - done) * (config.updates - update - 1))
                if samples and self.sample is not None and run.fabric.global_rank == 0:
                    # generate() reads one token at a time, which float8 layers cannot: they need multiples of 16.
                    with averaged(run.bare):
                        self.sample(result.for_inference() if config.float8 != "none" else run.module, update + 1)
                alone = run.fabric.world_size == 1  # other ranks know of a signal when the next update has begun
                stopped = (run.stopping or (alone and stop.signal is not None)) and not last
                # A signal that comes while a stream waits ends its batches; none is left for the next update.
                saves = saves or stopped
                if saves:
                    save(run, update + 1, train)
                if stopped:
                    result.stopped = stop.signal or signal.SIGTERM  # another rank got it
                    logger.warning("stopped by %s; %s", result.stopped.name, run.saved)
                    break
                started = time.perf_counter() if saves or samples or validates else now
            to_average(run.bare)
        return result

    def setup(
        self,
        stop: Stop | None = None,
        folder: Path | None = None,
        base: GPT | None = None,
        init_from: str | Path | None = None,
    ) -> Run:
        """Build and start everything that training needs; ``fit`` does this by itself.

        Args:
            stop: tells the run that a signal asked for its end.
            folder: the checkpoint that the run will go on from: it says how the run before fine-tuned.
            base: has the weights to start from.
            init_from: where they come from, for messages.

        Raises:
            ConfigurationError: if the settings cannot work.
        """
        model, finetune = self.model, self.finetune
        if folder is not None:
            finetune = resumed_finetuning(finetune, folder)
            if model is None and (shape := checkpoint.load_config(folder).get("model")) is not None:
                model = GPTConfig(**shape)
        if base is not None and init_from is not None:
            model = started_from(model, base, init_from)
        if model is None:
            raise ConfigurationError("there is no model: give a GPTConfig, or a checkpoint to start from (init_from).")
        return set_up(model, self.config, self.directory, stop or Stop(), finetune, base)


def is_due(update: int, every: int | None, last: bool) -> bool:
    """Return whether something that happens ``every`` so many updates is due after ``update`` (from 0)."""
    return every is not None and (last or (update + 1) % every == 0)


def log(record: Record, run: Run, left: float) -> None:
    """Log a line on an update of a run that has ``left`` seconds to go."""
    rate = record.tokens / record.seconds
    parts = (
        f"update {record.update}/{run.config.updates}: loss {record.loss:.4f}",
        "" if record.validation_loss is None else f"validation {record.validation_loss:.4f}",
        f"lr {record.learning_rate:.3g}, gradient norm {record.gradient_norm:.3f}, {rate:,.0f} tokens/s",
        f"{utilisation(run, rate)}, memory {record.memory / 2**30:.1f} GiB" if record.memory else "",
        f"left {datetime.timedelta(seconds=round(min(left, 1e9)))}" if left else "",
    )
    logger.info(", ".join(part for part in parts if part))


def utilisation(run: Run, rate: float) -> str:
    """Return MFU in words for a rate in tokens per second; unknown for other models and cards that are not known."""
    config, peak = getattr(run.module, "config", None), device_peak(run.fabric.device, run.config.precision)
    if peak is None or not isinstance(config, GPTConfig):
        return "MFU unknown"
    return f"MFU {rate * flops_per_token(config, config.block_size) / (peak * run.fabric.world_size):.1%}"
