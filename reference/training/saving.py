"""What a run puts into a checkpoint, and how it goes on from one."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reference import checkpoint
from reference.config import GPTConfig, as_plain
from reference.data.tokenizer import TEMPLATE
from reference.errors import CheckpointError
from reference.finetuning.config import FinetuneConfig
from reference.model.embedding import is_stable
from reference.optimizers import class_paths, roles
from reference.optimizers.averages import averaged
from reference.optimizers.roles import members
from reference.optimizers.state import load_optimizer_state, optimizer_state
from reference.training.batches import Pairs
from reference.training.launch import is_sharded, reduce
from reference.training.run import Run

logger = logging.getLogger("reference")


def save(run: Run, update: int, source: Any) -> None:
    """Write the checkpoint after ``update`` updates, from rank 0, and wait for it on every rank.

    Args:
        run: to be saved.
        update: number of updates done.
        source: of the batches; the tokenizer of a reference.TokenData is kept beside the weights.

    Raises:
        CheckpointError: on every rank, if the checkpoint could not be written.
    """
    weights: Any = run.module
    packed: dict[str, Any] = {}
    if is_sharded(run.fabric):
        from reference.training.sharding import gathered  # torch.distributed's parts take their time

        weights, packed = gathered(run.wrapped._forward_module, run.bare)
        # Gathered, a tied tensor comes once for each of its names.
        weights |= {name: weights[first] for name, first in run.ties.items() if first in weights}
    folder = checkpoint.step_folder(run.directory, update)
    state_of_optimizer = packed or optimizer_state(run.bare)  # of a schedule-free one before the weights move

    def write() -> None:
        state = {
            "update": update,
            "optimizer": state_of_optimizer,
            "optimizer_class": class_paths(run.config),
            "precision": run.fabric.strategy.precision.state_dict(),
            "stable_embedding": any(map(is_stable, run.module.modules())),
        }
        plain: dict[str, Any] = {"train": as_plain(run.config), "sequences_per_update": run.sequences}
        if isinstance(model_config := getattr(run.module, "config", None), GPTConfig):
            plain["model"] = as_plain(model_config)
        if run.finetune != FinetuneConfig():
            plain["finetune"] = dataclasses.asdict(run.finetune)  # what the next start must do before it loads weights
        file = getattr(source, "tokenizer_file", None)
        plain["tokenizer"] = file.name if file else getattr(source, "tokenizer", None)
        plain["end_of_document"] = getattr(source, "end_of_document", None)
        beside = [path for path in (file, file.with_name(TEMPLATE)) if path.is_file()] if file else []
        checkpoint.save(folder, weights, state, plain, {path.name: path for path in beside})
        checkpoint.prune(run.directory, run.config.keep_last, folder)

    with averaged(run.bare):  # the weights that a schedule-free model is used with
        on_rank_zero(run, write)
    run.saved = f"the newest checkpoint is {folder}"


def on_rank_zero(run: Run, function: Callable[[], None]) -> None:
    """Call a function on rank 0 and wait for it on every rank.

    Raises:
        CheckpointError: on every rank, if it raised one there. The others would wait for rank 0 forever.
    """
    failure = None
    if run.fabric.global_rank == 0:
        try:
            function()
        except CheckpointError as error:
            failure = error
    failed = reduce(run.fabric, torch.tensor(float(failure is not None), device=run.fabric.device), "sum")
    if failed > 0:
        raise failure or CheckpointError("rank 0 could not write checkpoints; its message says why.")


def restore(run: Run, folder: Path) -> int:
    """Load a checkpoint into a run and return the number of updates it has done.

    The settings of this run win over those in the saved parameter groups.

    Raises:
        CheckpointError: if it does not fit the run.
    """
    config, optimizer, root = run.config, run.bare, None
    if is_sharded(run.fabric):
        from reference.training.sharding import shard_optimizer_state, shard_weights

        root = run.wrapped._forward_module
    state = checkpoint.load_state(folder)
    saved, done = state["optimizer"], int(state["update"])
    run.saved = f"the newest checkpoint is {folder}"
    newer = [path.name for path in checkpoint.checkpoints(run.directory) if checkpoint.number(path) > done]
    if newer:
        logger.warning(
            "resume: %s holds newer checkpoints than %s, up to %s: they stay, and resume='auto' would take them",
            *(run.directory, folder.name, newer[-1]),
        )
    if saved is not None and state["optimizer_class"] != class_paths(config):
        raise CheckpointError(
            f"{folder} was trained with {state['optimizer_class']}, not {class_paths(config)}: "
            "resume with the same optimizer, or start afresh."
        )
    if root is None:
        checkpoint.load_model(folder, run.module)
    else:
        shard_weights(root, checkpoint.load_weights(folder))
    if saved is None:  # weights alone, from import_huggingface
        logger.info("resume: the weights of %s; it has no optimizer state, which starts afresh", folder)
        return done
    given = [
        {key: group[key] for key in role.optimizer_args if key in group}
        for role, member in zip(roles(config), members(optimizer), strict=False)  # LoRA may leave nothing to a second
        for group in member.param_groups
    ]
    try:
        if root is None:
            load_optimizer_state(optimizer, saved)
        else:
            shard_optimizer_state(optimizer, saved)
    except ValueError as error:  # other groups: another decay policy, or tensors that were frozen since
        raise CheckpointError(f"the optimizer state in {folder} does not fit: {error}.") from error
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        for key, value in settings.items():
            # The saved values would replace the configured ones. The learning rate follows the schedule anyway.
            if key != "lr" and group[key] != value:
                logger.info("resume: %s is %s, as configured now, not %s, as saved", key, value, group[key])
                group[key] = value
    run.fabric.strategy.precision.load_state_dict(state["precision"])
    logger.info("resume: from %s, after update %d", folder, done)
    return done


def tell_of_schedule(run: Run, folder: Path) -> None:
    """Log each number of the schedule that differs from that of the run that wrote the checkpoint."""
    saved = checkpoint.load_config(folder).get("train")
    now, before = (numbers_of_schedule(found) for found in (as_plain(run.config), saved))
    for key in sorted(now.keys() & before.keys()):
        if now[key] != before[key]:
            logger.info("resume: %s is %s, as configured now, not %s, as saved", key, now[key], before[key])


def numbers_of_schedule(settings: Any) -> dict[str, float]:
    """Return the settings of a schedule that are numbers; none if the settings, which may be forged, are no mapping."""
    if not isinstance(settings, dict):
        return {}
    arguments = settings.get("optimizer_args")
    rate = arguments.get("lr") if isinstance(arguments, dict) else None
    found = {"lr": rate} | {key: settings.get(key) for key in ("updates", "warmup", "cooldown", "min_lr")}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def warn_about_order(run: Run, folder: Path, pairs: Pairs) -> None:
    """Log a warning if an update has more or fewer sequences than before a checkpoint, which counts updates only."""
    before, now = checkpoint.load_config(folder).get("sequences_per_update"), run.count_sequences(pairs)
    if before is not None and before != now:
        logger.warning(
            "resume: an update has %d sequences now, and had %d before %s: the place in the data is counted in "
            "updates, so some sequences of this epoch are %s",
            *(now, before, folder, "left out" if now > before else "seen again"),
        )
