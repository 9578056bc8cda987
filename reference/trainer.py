"""The training loop, on Lightning Fabric: build, accumulate, clip, step, evaluate, save, resume."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from reference import checkpoint
from reference.config import ConfigurationError, GPTConfig, TrainConfig, as_plain
from reference.embedding import restore_embeddings, swap_embeddings, swap_wanted
from reference.initialize import build, choose_strategy, derive_seed
from reference.model import GPT
from reference.optimizer import build_optimizer, find_class, load_optimizer_state, optimizer_state
from reference.schedule import learning_rate
from reference.update import Batch, accumulate, clip, evaluate, repeat, require_finite

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


@dataclass
class FitResult:
    """What a run leaves: the trained module, its optimizer, and one Record per update."""

    model: nn.Module
    """The module as it was trained, without Fabric's and torch.compile's wrappers."""
    optimizer: torch.optim.Optimizer
    records: list[Record] = field(default_factory=list)

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
        callbacks: functions called with the Record of every update.
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
        train: Iterable[Batch],
        validation: Iterable[Batch] | None = None,
        resume: bool | Literal["auto"] | str | Path = False,
    ) -> FitResult:
        """Train to the last update.

        Args:
            train: batches of token ids (B, T + 1), or pairs of ids and targets (B, T) where a target of -100 is
                ignored. Read from its start again when it ends; on several ranks, each gives its own.
            validation: batches of the same kind; all of them are evaluated each time.
            resume: False, True (newest checkpoint in ``directory``), ``auto`` (newest, if any) or a path. The
                batches that were consumed before are skipped.

        Raises:
            ConfigurationError: settings that cannot work.
            CheckpointError: a checkpoint that is missing, damaged or of another model.
            TrainingError: a loss or gradient that is not finite, or a source of batches that gives none.
        """
        config = self.config
        folder = checkpoint.find(resume, self.directory)
        optimizer_class = find_class(config.optimizer)
        fabric = launch(config)
        module = self.build_module(fabric)
        if swap_wanted(config.stable_embedding, optimizer_class):
            swap_embeddings(module)  # before the optimizer, which must own the tensors that are trained
        compiled: Any = torch.compile(module) if config.compile else module
        wrapped = fabric.setup_module(compiled)
        scaled = config.precision == "16-mixed"
        bare = build_optimizer(config.optimizer, config.optimizer_args, module, fabric.device, config.decay, scaled)
        peaks = [group["lr"] for group in bare.param_groups]
        optimizer: Any = fabric.setup_optimizers(bare)
        done = restore(folder, fabric, module, bare, config) if folder is not None else 0
        warn_about_rounding(config)
        if validation is not None and config.evaluate_every is None:
            logger.info("validation: batches were given, but evaluate_every is None: they are not evaluated")

        result = FitResult(module, bare)
        batches = itertools.islice(repeat(train, config.seed, fabric.global_rank), done * config.microbatches, None)
        wrapped.train()
        for update in range(done, config.updates):
            for group, peak in zip(bare.param_groups, peaks, strict=True):
                group["lr"] = learning_rate(
                    update,
                    peak=peak,
                    updates=config.updates,
                    schedule=config.schedule,
                    warmup=config.warmup,
                    minimum=config.min_lr,
                    cooldown=config.cooldown,
                )
            started = time.perf_counter()
            micro = list(itertools.islice(batches, config.microbatches))
            # Dropout is a function of seed, update and rank, so a resumed run draws what it would have drawn. After
            # the batches, which may draw too: a DataLoader does, when a pass begins.
            torch.manual_seed(derive_seed(config.seed, update, fabric.global_rank))
            loss, tokens = accumulate(fabric, wrapped, micro)
            require_finite("loss", loss, fabric, update)
            norm = clip(fabric, wrapped, optimizer, config.clip, update)
            optimizer.step()
            optimizer.zero_grad()
            last = update + 1 == config.updates
            validation_loss = None
            if validation is not None and is_due(update, config.evaluate_every, last):
                validation_loss = evaluate(fabric, wrapped, validation)
            record = Record(update + 1, loss, bare.param_groups[0]["lr"], norm, tokens, validation_loss)
            result.records.append(record)
            for callback in self.callbacks:
                callback(record)
            if is_due(update, config.log_every, last) or update == done:
                log(record, config.updates, time.perf_counter() - started)
            if is_due(update, config.save_every, last):
                self.save(fabric, module, bare, update + 1)
        return result

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
            return build(factory, strategy, fabric.device, sharded)

    def save(self, fabric: "Fabric", module: nn.Module, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Write a checkpoint after ``update`` updates, from rank 0, and wait for it on every rank."""
        if is_sharded(fabric):
            raise ConfigurationError(
                "checkpoints of sharded parameters are not written by this trainer: "
                "set save_every=None under FSDP, or use strategy='ddp'."
            )
        if fabric.global_rank == 0:
            state = {
                "update": update,
                "optimizer": optimizer_state(optimizer),
                "optimizer_class": self.config.optimizer,
                "precision": fabric.strategy.precision.state_dict(),
                "stable_embedding": any(type(m).__name__ == "StableEmbedding" for m in module.modules()),
            }
            model_config = getattr(module, "config", None)
            plain = {"train": as_plain(self.config)}
            if isinstance(model_config, GPTConfig):
                plain["model"] = as_plain(model_config)
            folder = checkpoint.step_folder(self.directory, update)
            checkpoint.save(folder, module, state, plain)
            logger.info("checkpoint: %s", folder)
        fabric.barrier()


def gpt_factory(config: GPTConfig, seed: int) -> Callable[[], nn.Module]:
    """A function that builds the GPT."""
    return lambda: GPT(config, seed)


def launch(config: TrainConfig) -> "Fabric":
    """Start Fabric with the precision that was asked for, or refuse.

    Raises:
        ConfigurationError: if the device cannot compute in that precision.
    """
    from lightning.fabric import Fabric

    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=config.strategy,
        precision=config.precision,
    )
    if config.precision == "16-mixed" and fabric.device.type == "cpu":
        # Fabric would go on in bf16-mixed with a warning: a precision that nobody asked for.
        raise ConfigurationError("precision='16-mixed' needs a GPU: on the CPU choose 'bf16-mixed' or '32-true'.")
    fabric.launch()
    if config.logits == "compute":
        # Fabric's wrapper turns every floating output into float32. The loss below does that by itself, and under
        # torch.compile without writing the float32 logits to memory.
        fabric.strategy.precision.convert_output = keep_dtype  # type: ignore[method-assign, assignment] # of this instance
    logger.info("logits: leave the model in %s", "float32" if config.logits == "float32" else "the computing dtype")
    return fabric


def keep_dtype(output: Any) -> Any:
    """Fabric's conversion of the model's output, switched off."""
    return output


def is_sharded(fabric: "Fabric") -> bool:
    """Whether the strategy shards parameters over ranks, told without importing its module."""
    return type(fabric.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")


def restore(
    folder: Path, fabric: "Fabric", module: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> int:
    """Load a checkpoint into module and optimizer; the number of updates it has done.

    Raises:
        CheckpointError: if it does not fit them.
    """
    state = checkpoint.load_state(folder)
    if state["optimizer_class"] != config.optimizer:
        raise checkpoint.CheckpointError(
            f"{folder} was trained with {state['optimizer_class']}, not {config.optimizer}: "
            "resume with the same optimizer, or start afresh."
        )
    checkpoint.load_model(folder, module)
    given = [{key: group[key] for key in config.optimizer_args if key in group} for group in optimizer.param_groups]
    try:
        load_optimizer_state(optimizer, state["optimizer"])
    except ValueError as error:  # other groups: another decay policy, or tensors that were frozen since
        raise checkpoint.CheckpointError(f"the optimizer state in {folder} does not fit: {error}.") from error
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        for key, value in settings.items():
            # The saved values would replace the configured ones. The learning rate follows the schedule anyway.
            if key != "lr" and group[key] != value:
                logger.info("resume: %s is %s, as configured now, not %s, as saved", key, value, group[key])
                group[key] = value
    fabric.strategy.precision.load_state_dict(state["precision"])
    logger.info("resume: from %s, after update %d", folder, state["update"])
    return int(state["update"])


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


def log(record: Record, updates: int, seconds: float) -> None:
    """One line on an update."""
    validation = "" if record.validation_loss is None else f", validation {record.validation_loss:.4f}"
    logger.info(
        f"update {record.update}/{updates}: loss {record.loss:.4f}{validation}, "
        f"lr {record.learning_rate:.3g}, gradient norm {record.gradient_norm:.3f}, "
        f"{record.tokens / seconds:,.0f} tokens/s"
    )
