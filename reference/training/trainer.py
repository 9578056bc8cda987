"""The training loop, on Lightning Fabric: build, accumulate, clip, step, evaluate, save, resume."""

import logging
import re
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from reference.checkpoint import folder as checkpoint
from reference.config import ConfigurationError, GPTConfig, TrainConfig
from reference.model.embedding import restore_embeddings, swap_embeddings, swap_wanted
from reference.model.gpt import GPT
from reference.model.initialization import build, choose_strategy, tied_names
from reference.optimizers.build import build_optimizer, find_class
from reference.training.launch import is_sharded, launch
from reference.training.run import Run, TokenSource
from reference.training.stopping import Stop, stop_on_signals
from reference.training.update import Batch, TokenLoss

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("reference")

Callback = Callable[["Record"], None]


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
        """A copy in eval mode with plain embeddings."""
        return restore_embeddings(self.model)


class Trainer:
    """Trains any module that maps token ids (B, T) to logits (B, T, V).

    Args:
        model: a GPTConfig; or a function that builds a module, so that it is built on the right device, in the
            right dtype and after seeding; or a module, which is taken as it is.
        config: how to train.
        directory: where checkpoints go.
        callbacks: functions called with the Record of every update, on every rank.
    """

    def __init__(
        self,
        model: GPTConfig | Callable[[], nn.Module] | nn.Module,
        config: TrainConfig | None = None,
        directory: str | Path = "out",
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.model = model
        self.config = config or TrainConfig()
        self.directory = Path(directory)
        self.callbacks = tuple(callbacks)

    def fit(
        self,
        train: Iterable[Batch] | TokenSource,
        validation: Iterable[Batch] | TokenSource | None = None,
        resume: bool | Literal["auto"] | str | Path = False,
    ) -> FitResult:
        """Train to the last update.

        Ctrl-C or SIGTERM end the run after the update that is running, with a checkpoint, and ``stopped`` in the
        result says so; a second one acts at once.

        Args:
            train: a TokenData; or batches of token ids (B, T + 1), or pairs of ids and targets (B, T)
                where a target of -100 is ignored, which are read from their start again when they end. TokenData
                gives each rank its part; of other batches, each rank gives its own.
            validation: the same; all of it, or the first ``evaluate_batches``, is evaluated each time.
            resume: False, True (newest checkpoint in ``directory``), ``auto`` (newest, if any) or a path. The
                batches that were consumed before are skipped.

        Raises:
            ConfigurationError: settings that cannot work.
            CheckpointError: a checkpoint that is missing, damaged or of another model.
            TrainingError: a loss or gradient that is not finite, or a source of batches that gives none.
        """
        config = self.config
        folder = checkpoint.find(resume, self.directory)
        with stop_on_signals() as stop:
            run = self.setup(stop)
            require_vocabulary(run.module, train, validation)
            if folder is not None:
                require_tokenizer(folder, train)
            done = run.restore(folder) if folder is not None else 0
            if done >= config.updates:
                logger.warning(
                    "resume: %s has done %d updates, and updates=%d: nothing is left to train",
                    folder,
                    done,
                    config.updates,
                )
            if config.save_every is not None:  # now, rather than after hours of training
                run.on_rank_zero(lambda: checkpoint.require_writable(self.directory))
            if validation is not None and config.evaluate_every is None:
                logger.info("validation: batches were given, but evaluate_every is None: they are not evaluated")
            result = FitResult(run.module, run.bare)
            batches = run.batches(train, done)
            upcoming = run.fetch(batches) if done < config.updates else []
            if folder is not None and upcoming:
                run.warn_about_order(folder, upcoming)
            started = time.perf_counter()
            for update in range(done, config.updates):
                last = update + 1 == config.updates
                did = run.update_once(update, upcoming, None if last else batches)
                upcoming = did.following
                now = time.perf_counter()
                validation_loss = None
                if validation is not None and is_due(update, config.evaluate_every, last):
                    validation_loss = run.evaluate(validation)
                record = Record(
                    update=update + 1,
                    loss=did.loss,
                    learning_rate=float(run.bare.param_groups[0]["lr"]),
                    gradient_norm=did.gradient_norm,
                    tokens=did.tokens,
                    validation_loss=validation_loss,
                    seconds=now - started,
                    memory=allocated(run.fabric.device),
                )
                result.records.append(record)
                for callback in self.callbacks:
                    callback(record)
                if is_due(update, config.log_every, last) or update == done:
                    log(record, config.updates)
                stopped = run.must_stop() and not last
                saves = stopped or is_due(update, config.save_every, last)
                if saves:
                    run.save(update + 1, getattr(train, "tokenizer_file", None) or getattr(train, "tokenizer", None))
                if stopped:
                    result.stopped = stop.signal or signal.SIGTERM  # another rank got it
                    logger.warning("stopped by %s; %s", result.stopped.name, run.saved)
                    break
                started = time.perf_counter() if saves or validation_loss is not None else now
        return result

    def setup(self, stop: Stop | None = None) -> Run:
        """Everything that training needs, built and started; ``fit`` does this by itself.

        Args:
            stop: tells the run that a signal asked for its end.

        Raises:
            ConfigurationError: settings that cannot work.
        """
        config = self.config
        optimizer_class = find_class(config.optimizer)
        fabric = launch(config)
        if is_sharded(fabric) and not optimizer_class.__module__.startswith("torch."):
            raise ConfigurationError(
                f"{config.optimizer} keeps state that cannot be gathered from sharded parameters: under FSDP use an "
                "optimizer of torch.optim, or use strategy='ddp'."
            )
        module = self.build_module(fabric)
        if swap_wanted(config.stable_embedding, optimizer_class):
            swap_embeddings(module)  # before the optimizer, which must own the tensors that are trained
        if config.activation_checkpointing:
            checkpoint_activations(module)
        ties = {other: first for first, others in tied_names(module).items() for other in others}
        # FSDP flattens the tensors, and the decay policy asks for their dimensions.
        dimensions = {name: tensor.ndim for name, tensor in module.named_parameters(remove_duplicate=False)}
        compiled: Any = torch.compile(TokenLoss(module)) if config.compile else module
        wrapped = fabric.setup_module(compiled)
        bare = build_optimizer(
            config.optimizer,
            config.optimizer_args,
            module,
            fabric.device,
            config.decay,
            scaled=config.precision == "16-mixed",
            capture=config.capture_step,
            dimensions=dimensions,
        )
        peaks = [group["lr"] for group in bare.param_groups]
        if config.min_lr is not None and config.schedule != "constant" and config.min_lr > min(peaks):
            raise ConfigurationError(
                f"min_lr is {config.min_lr}, above the optimizer's lr of {min(peaks)}: the rate would rise to it. "
                "Give a smaller one, or None for a tenth of lr."
            )
        optimizer: Any = fabric.setup_optimizers(bare)
        warn_about_rounding(config)
        wrapped.train()
        return Run(config, fabric, module, wrapped, bare, optimizer, peaks, self.directory, stop or Stop(), ties)

    def build_module(self, fabric: "Fabric") -> nn.Module:
        """The module, built and initialised as environment and configuration want it."""
        if isinstance(self.model, nn.Module):
            logger.info("initialization: the module came initialised and is taken as it is")
            return self.model
        sharded = is_sharded(fabric)
        strategy = choose_strategy(self.config.initialization, sharded)
        factory = gpt_factory(self.model, self.config.seed) if isinstance(self.model, GPTConfig) else self.model
        fabric.seed_everything(self.config.seed, verbose=False)  # the same on every rank: they build the same module
        # NOTE a footgun: not empty_init=True. It skips the constructor's initialisation on one device (litgpt#689).
        with fabric.init_module(empty_init=False) if strategy == "eager" else fabric.init_tensor():
            try:
                return build(factory, strategy, fabric.device, sharded)
            except RuntimeError as error:
                if not isinstance(self.model, GPTConfig) or not re.search("overflowed|allocate", str(error)):
                    raise
                raise ConfigurationError(f"no memory is large enough for the model of {self.model}.") from error


def gpt_factory(config: GPTConfig, seed: int) -> Callable[[], nn.Module]:
    """A function that builds the GPT."""
    return lambda: GPT(config, seed)


def warn_about_rounding(config: TrainConfig) -> None:
    """Say what bfloat16 weights cost, where there is no float32 copy of them."""
    if config.precision == "bf16-true":
        logger.warning(
            "precision bf16-true keeps no float32 weights: an update smaller than half a unit in the last place of a "
            "weight (1/512 of it) is lost to rounding. Use bf16-mixed unless memory forbids."
        )


def is_due(update: int, every: int | None, last: bool) -> bool:
    """Whether something that happens ``every`` so many updates is due after ``update`` (from 0)."""
    return every is not None and (last or (update + 1) % every == 0)


def log(record: Record, updates: int) -> None:
    """One line on an update."""
    validation = "" if record.validation_loss is None else f", validation {record.validation_loss:.4f}"
    logger.info(
        f"update {record.update}/{updates}: loss {record.loss:.4f}{validation}, "
        f"lr {record.learning_rate:.3g}, gradient norm {record.gradient_norm:.3f}, "
        f"{record.tokens / record.seconds:,.0f} tokens/s"
    )


def allocated(device: torch.device) -> int:
    """Most bytes that tensors have taken on a GPU since the process began; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def require_vocabulary(module: nn.Module, *sources: Any) -> None:
    """Raise ConfigurationError if token files hold ids that a GPT has no row for."""
    config = getattr(module, "config", None)
    for source in sources:
        size = getattr(source, "vocab_size", None)
        if isinstance(config, GPTConfig) and size is not None and size > config.vocab_size:
            raise ConfigurationError(
                f"the data has a vocabulary of {size} tokens, but the model one of {config.vocab_size}: "
                f"set vocab_size to {size} or more."
            )


def require_tokenizer(folder: Path, source: Any) -> None:
    """Raise ConfigurationError if token files were written with another tokenizer than those of a checkpoint.

    Vocabularies of equal size fit, and every id would mean something else.

    Args:
        folder: the checkpoint.
        source: a reference.data.tokens.TokenData. Of other sources nothing is known, and nothing is raised.
    """
    trained, given = checkpoint.load_config(folder)["tokenizer"], getattr(source, "tokenizer", None)
    file = getattr(source, "tokenizer_file", None)
    if not isinstance(trained, str) or not isinstance(given, str):
        return
    if trained != given or (file is not None and file.read_bytes() != (folder / trained).read_bytes()):
        raise ConfigurationError(
            f"{folder} was trained on ids of another tokenizer than that of {source.folder}: the loss would mean "
            "nothing. Prepare the text with the tokenizer of the checkpoint."
        )


def checkpoint_activations(module: nn.Module) -> None:
    """Have a GPT compute its blocks again in backward instead of keeping what is inside them.

    Raises:
        ConfigurationError: if the module is none of ours.
    """
    if not isinstance(module, GPT):
        raise ConfigurationError(
            f"activation_checkpointing=True works on reference.GPT, not on {type(module).__name__}: wrap its blocks "
            "with torch.utils.checkpoint yourself, and set it False."
        )
    module.checkpoint_blocks = True
