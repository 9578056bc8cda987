"""What ``python -m reference train`` does: data, settings on disk, callbacks, and the Trainer."""

import contextlib
import dataclasses
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reference.cli.presets import PRESETS, tuning_rate
from reference.cli.settings import Settings, read_settings
from reference.cli.starting import checkpoint_to_resume, require_shape, run_name, tokenizer_of
from reference.config import DataConfig
from reference.errors import CheckpointError, ConfigurationError, ExplainedError, quoted
from reference.files import write_file

if TYPE_CHECKING:
    from torch import nn

    from reference.data.stream import TextStream
    from reference.data.tokens import TokenData
    from reference.training.trainer import Callback, Record, Sampler

logger = logging.getLogger("reference")

GENTLE = 10  # times the rate that tunes trained weights: what is above is not for that


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Show on stderr what the reference logs."""
    from rich.console import Console

    from reference.cli.progress import logging_to

    with logging_to(Console(stderr=True)):
        yield


def train_command(arguments: Sequence[str]) -> int:
    """Train and return the exit code.

    Raises:
        ConfigurationError, CheckpointError, DataError, TrainingError: in one sentence each.
    """
    wanted = [argument for argument in arguments if argument != "--print_config"]
    settings = read_settings(wanted)
    if len(wanted) < len(arguments):
        print(settings.yaml(), end="")
        return 0
    return train(settings)


def train(settings: Settings) -> int:
    """Run what the settings describe and return the exit code."""
    from rich.console import Console

    from reference.cli.progress import live_line, logging_to, say, waiting

    with waiting("Loading PyTorch"):
        import torch
        from lightning.fabric.utilities import rank_zero_only

        from reference.checkpoint import checkpoints
        from reference.cli.boundary import explain
        from reference.cli.loggers import csv_metrics, metrics_file, tensorboard, tolerant, wandb
        from reference.training.trainer import Trainer

    console = Console(stderr=True)
    require_processors(settings)
    first_rank = getattr(rank_zero_only, "rank", 0) == 0
    directory = Path(settings.directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(console, first_rank))
        folder = checkpoint_to_resume(settings.resume, directory)
        if folder is None and settings.init_from is None and settings.finetune.lora_rank is not None:
            raise ConfigurationError(
                "lora_rank trains adapters beside weights that stay as they are, but this run would start from random "
                "ones: name trained weights with --init_from, or leave lora_rank out."
            )
        settings, training, validation = open_data(settings)
        warn_of_rate(folder, settings)
        if folder is not None and settings.resume not in (True, "auto"):  # a path: of a run or an import elsewhere
            require_shape(folder, settings.model)
        if first_rank:
            require_directory(directory)
        run = settings.train
        shown = stack.enter_context(live_line(run.updates, console))
        writes = tolerant(settings_writer(settings), str(directory / "config.yaml"))
        callbacks = [shown, rank_zero_only(writes), csv_metrics(directory)]
        if settings.tensorboard:
            callbacks.append(stack.enter_context(tensorboard(directory)))
        if settings.wandb is not None:
            callbacks.append(stack.enter_context(wandb(settings.wandb, directory, settings.plain())))
        sample = sampler(settings) if run.sample_every is not None else None
        trainer = Trainer(settings.model, run, directory, callbacks, settings.finetune, sample)
        try:
            result = trainer.fit(training, validation, folder or False, settings.init_from)
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"the GPU does not have enough memory for microbatches of {settings.data.microbatch_size}: halve "
                "--data.microbatch_size and double --train.microbatches (the updates are the same), "
                "or set --train.activation_checkpointing true."
            ) from error
        except (ExplainedError, OSError):
            raise
        except (Exception, SystemExit) as error:  # the second: of an optimizer's class that ends the process
            if (told := explain(error, settings)) is None:
                raise  # a fault of the program
            raise told from error
    if first_rank:
        files = [directory / "config.yaml", metrics_file(directory), *checkpoints(directory)[-1:]]
        if written := [str(file) for file in files if file.exists()]:
            say(console, f"Written: {', '.join(written)}")
        if result.stopped is not None:
            again = f"python -m reference train --config {quoted(directory / 'config.yaml')} --resume auto"
            say(console, f"Go on with: {again}")
        elif run.save_every is not None:
            say(console, f"Try: python -m reference generate --checkpoint {quoted(directory)}")
    return 0 if result.stopped is None else 128 + result.stopped


def open_data(settings: Settings) -> "tuple[Settings, TokenData | TextStream, TokenData | None]":
    """Return settings with a vocabulary that fits the data, the training split and the validation split.

    The default data is prepared if it does not exist yet. The preset tiny takes the vocabulary of the data unless the
    settings have another than the preset's; for the others the Trainer checks that the data fits.

    Raises:
        DataError: if the data is missing or damaged.
    """
    from reference.data import TokenData
    from reference.data.prepare import prepare_default
    from reference.data.stream import TextStream

    folder, model = Path(settings.data.path), settings.model
    if settings.init_from is not None:
        prepare_for_weights(Path(settings.init_from), folder)
    if settings.data.path == DataConfig().path:
        if not (folder / "train.json").exists():
            logger.info("data: preparing %s from this Python's standard library, as bytes", folder)
        prepare_default(folder, progress=True)  # does nothing where it is there
    shape = {
        "block_size": model.block_size,
        "microbatch_size": settings.data.microbatch_size,
        "seed": settings.train.seed,
    }
    training: TokenData | TextStream
    if settings.data.stream is None:
        training = TokenData(folder, "train", **shape)
    else:
        sizes = {name: shape[name] for name in ("block_size", "microbatch_size")}
        training = TextStream(settings.data.stream, folder, **sizes)
    validation = TokenData(folder, "validation", **shape) if settings.train.evaluate_every is not None else None
    for data in (training, validation):
        if data is not None:
            logger.info("data: %s", data.describe())
    if settings.preset == "tiny" and model.vocab_size == PRESETS["tiny"].model.vocab_size != training.vocab_size:
        logger.info("model: vocab_size is %d, as in the data, instead of %d", training.vocab_size, model.vocab_size)
        settings = dataclasses.replace(settings, model=dataclasses.replace(model, vocab_size=training.vocab_size))
    return settings, training, validation


def sampler(settings: Settings) -> "Sampler":
    """Return what logs a sample of text: up to 100 tokens, drawn with the run's seed.

    Raises:
        ConfigurationError: if the data has no tokenizer that gives text, or the prompt is too long.
    """
    from reference.data.tokenizer import load_tokenizer
    from reference.model.generation import check_prompt, generate

    tokenizer = load_tokenizer(settings.data.path)
    prompt = tokenizer.encode(settings.sample_prompt) or [tokenizer.end_of_document]
    check_prompt(prompt, tokenizer.vocab_size, settings.model.block_size)

    def sample(model: "nn.Module", update: int) -> None:
        ids = generate(
            model,
            prompt,
            tokens=100,
            temperature=0.8,
            top_p=0.95,
            seed=settings.train.seed,
            end=tokenizer.end_of_document,
            vocab_size=tokenizer.vocab_size,
        )
        text = settings.sample_prompt + "".join(tokenizer.stream(ids))
        told = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
        logger.info("sample after update %d:\n%s", update, textwrap.indent(told, "    ", lambda _: True))

    return sample


def prepare_for_weights(start: Path, folder: Path) -> None:
    """Prepare Python's standard library with the tokenizer of trained weights, if ``folder`` is the place for that."""
    from reference.data.prepare import prepare

    if str(folder) == f"{DataConfig().path}-{run_name(start)}" and not (folder / "train.json").exists():
        logger.info("data: preparing %s from this Python's standard library, with the tokenizer of %s", folder, start)
        prepare([], tokenizer_of(start), folder, progress=True)


def warn_of_rate(folder: Path | None, settings: Settings) -> None:
    """Log a warning if a run goes on from trained weights at the rates of pretraining."""
    from reference.checkpoint.folder import number
    from reference.optimizers import roles

    imported = folder is not None and number(folder) == 0
    tuned = folder is None and settings.init_from is not None and settings.finetune.lora_rank is None
    if not imported and not tuned:
        return
    for role, option in zip(roles(settings.train), ("optimizer_args", "optimizer_rest_args")):
        rate, right = role.optimizer_args.get("lr"), tuning_rate(role.optimizer, role.optimizer_args)
        if right is None or not isinstance(rate, float) or rate <= GENTLE * right:
            continue
        advice = f"set --train.{option}.lr {right:.0e}".replace("e-0", "e-")
        if folder is not None:
            advice += f", or give --config {quoted(folder.parent / 'config.yaml')}"
        logger.warning(
            "a learning rate of %g is for pretraining, and may destroy what the weights of %s know: %s",
            *(rate, folder or settings.init_from, advice),
        )


def require_processors(settings: Settings) -> None:
    """Raise ConfigurationError if a run on the CPU asks for many more processes than there are processors."""
    import torch

    run, most = settings.train, 16 * (os.cpu_count() or 1)
    if run.devices > most and (run.accelerator == "cpu" or not torch.accelerator.is_available()):
        raise ConfigurationError(
            f"devices is {run.devices}, but this machine has {os.cpu_count()} processors: choose at most {most}."
        )


def require_directory(directory: Path) -> None:
    """Raise ConfigurationError if nothing can be written to the run's directory."""
    from reference.checkpoint import require_writable

    try:
        require_writable(directory)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error


def settings_writer(settings: Settings) -> "Callback":
    """Return a callback that writes ``config.yaml`` in the run's directory, after the first update.

    Not before: settings that do not fit the checkpoint would replace those that do, and keep the run from going on.
    """
    written = False

    def write(record: "Record") -> None:
        nonlocal written
        if not written:
            write_file(Path(settings.directory) / "config.yaml", settings.yaml().encode())
            written = True

    return write
