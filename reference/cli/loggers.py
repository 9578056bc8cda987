"""Metrics, as callbacks of the Trainer, written by Fabric's loggers: CSV always, TensorBoard and wandb if wanted.

Those on disk go on where a resumed run goes on: rows of updates that are done again are not kept twice.
"""

import contextlib
import csv
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reference.errors import ConfigurationError, first_line

if TYPE_CHECKING:
    from reference.training.trainer import Record


def metrics_file(directory: Path) -> Path:
    """Return where :func:`csv_metrics` writes: one row per update, with ``step`` as its number."""
    return directory / "metrics" / "metrics.csv"


def csv_metrics(directory: Path) -> Callable[["Record"], None]:
    """Return a callback that writes a row per update, on rank 0.

    A run that begins at update 1 begins a new file. One that was resumed keeps the rows before it.
    """
    from lightning.fabric.loggers.csv_logs import CSVLogger
    from lightning.fabric.utilities import rank_zero_only

    file = metrics_file(directory)
    # Flushed at each row: a run that is killed keeps its metrics.
    logger = CSVLogger(directory, name="metrics", version="", flush_logs_every_n_steps=1)
    started = False

    def write(record: "Record") -> None:
        nonlocal started
        if not started:
            earlier = read_rows(file, before=record.update)
            file.unlink(missing_ok=True)  # the logger would remove it too, but with a warning
            for row in earlier:
                logger.log_metrics(row, int(row.pop("step")))
            started = True
        logger.log_metrics(metrics(record), record.update)

    return rank_zero_only(tolerant(write, str(file)))


def tolerant(write: Callable[["Record"], None], what: str) -> Callable[["Record"], None]:
    """Return a callback that warns, once, where ``write`` cannot write: no file beside them is worth checkpoints."""
    warned = False

    def attempt(record: "Record") -> None:
        nonlocal warned
        try:
            write(record)
        except (OSError, ValueError) as error:  # the second: a file there that is not one of ours
            if not warned:
                logging.getLogger("reference").warning(
                    "%s cannot be written after update %d (%s): the run goes on without it",
                    *(what, record.update, getattr(error, "strerror", None) or first_line(error)),
                )
            warned = True

    return attempt


def read_rows(file: Path, before: int) -> list[dict[str, Any]]:
    """Return the rows of a metrics file with a ``step`` below ``before``; none if there is no file.

    A row that a killed run did not finish is left out.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if None not in row.values() and str(row["step"]).isdecimal()]
    return [row for row in rows if int(row["step"]) < before]


@contextlib.contextmanager
def tensorboard(directory: Path) -> Iterator[Callable[["Record"], None]]:
    """Yield a callback that writes TensorBoard's event files to ``directory/tensorboard``, on rank 0.

    Raises:
        ConfigurationError: if the package tensorboard is missing.
    """
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger
    from lightning.fabric.utilities import rank_zero_only

    try:
        importlib.import_module("tensorboard")
    except ImportError as error:
        raise ConfigurationError(
            "--tensorboard needs the package tensorboard: run pip install 'gpt-conformance[tensorboard]', "
            "or leave it out; metrics are written as CSV in any case."
        ) from error
    logger: TensorBoardLogger | None = None

    def write(record: "Record") -> None:
        nonlocal logger
        if logger is None:  # what an earlier run wrote of this and later updates is marked as void
            logger = TensorBoardLogger(directory, name="tensorboard", version="", purge_step=record.update)
        present = {key: value for key, value in metrics(record).items() if value is not None}
        logger.log_metrics(present, record.update)

    try:
        yield rank_zero_only(tolerant(write, str(directory / "tensorboard")))
    finally:
        if logger is not None:
            logger.finalize("finished")


@contextlib.contextmanager
def wandb(project: str, directory: Path, settings: Mapping[str, Any]) -> Iterator[Callable[["Record"], None]]:
    """Yield a callback that logs to a project of Weights & Biases, on rank 0; ``WANDB_MODE=offline`` keeps it local.

    Args:
        project: its name.
        directory: of the run; wandb keeps its files there.
        settings: shown beside the run's curves.

    Raises:
        ConfigurationError: if the package wandb is missing, or cannot start a run.
    """
    from lightning.fabric.utilities import rank_zero_only

    try:
        module = importlib.import_module("wandb.integration.lightning.fabric")
    except ImportError as error:
        raise ConfigurationError(
            "--wandb needs the package wandb: run pip install 'gpt-conformance[wandb]', or leave it out; metrics are "
            "written as CSV in any case."
        ) from error
    logger = None
    if getattr(rank_zero_only, "rank", 0) == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            logger = module.WandbLogger(project=project, name=directory.name, save_dir=str(directory))
            logger.log_hyperparams(dict(settings))  # starts the run: what is wrong is told before training
        except Exception as error:  # wandb has many of its own, and they are no common class
            raise ConfigurationError(
                f"wandb cannot start a run in the project {project!r} ({first_line(error).rstrip('.')}): log in with "
                "'wandb login', set WANDB_MODE=offline, or leave --wandb out."
            ) from error

    def write(record: "Record") -> None:
        present = {key: value for key, value in metrics(record).items() if value is not None}
        assert logger is not None  # on rank 0
        logger.log_metrics(present, record.update)

    status = "failed"
    try:
        yield rank_zero_only(tolerant(write, "the log of wandb"))
        status = "success"
    finally:
        if logger is not None:
            logger.experiment.finish(exit_code=int(status != "success"))


def metrics(record: "Record") -> dict[str, Any]:
    """Return a record as columns: all of its fields but the number of the update."""
    return {key: value for key, value in asdict(record).items() if key != "update"}
