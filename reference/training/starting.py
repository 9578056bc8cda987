"""A run that starts from the weights of another: its shape, its weights, and what changes their function."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from reference import checkpoint
from reference.config import GPTConfig
from reference.errors import ConfigurationError, first_line
from reference.finetuning.config import FinetuneConfig
from reference.model.gpt import GPT
from reference.model.loss import batch_loss
from reference.model.modes import evaluation_mode
from reference.training.batches import Pairs, count_targets
from reference.training.launch import reduce
from reference.training.run import Run
from reference.training.setup import ModelSource

logger = logging.getLogger("reference")

FREE = ("dropout", "fp32_residual")  # fields of the shape that weights do not depend on


def load_base(folder: str | Path) -> GPT:
    """Return the model to start from: that of a checkpoint, or of the newest in a run's directory.

    Raises:
        CheckpointError: if there is none, or it is damaged or of a module that is not a reference.GPT.
    """
    return checkpoint.load_for_inference(base_folder(folder))


def base_folder(folder: str | Path) -> Path:
    """Return the checkpoint to start from: the folder itself, or the newest one in a run's directory."""
    path = Path(folder)
    return next(reversed(checkpoint.checkpoints(path)), path)


def require_same_ids(folder: Path, source: Any) -> None:
    """Raise ConfigurationError if token files were written with ids that mean something else to trained weights.

    A chat model's tokenizer has its base's ids and more special tokens; that is no other tokenizer here, as it is to a
    run that goes on from its own checkpoint. Other sources tell nothing to compare.
    """
    trained, given = checkpoint.load_config(folder)["tokenizer"], getattr(source, "tokenizer", None)
    file = getattr(source, "tokenizer_file", None)
    if not isinstance(trained, str) or not isinstance(given, str):
        return
    if trained != given or (file is not None and words_of(file) != words_of(folder / trained)):
        raise ConfigurationError(
            f"the weights of {folder} were trained with a tokenizer other than that of the data in {source.folder} "
            f"({given}), so the ids would mean nothing to them: prepare the text with --tokenizer "
            f"{folder if trained != 'bytes' else trained}."
        )


def words_of(file: Path) -> dict[str, int]:
    """Return the ids of a tokenizer.json by token, without those that were added to its model, such as special ones."""
    from tokenizers import Tokenizer

    try:
        return dict(Tokenizer.from_str(file.read_text(encoding="utf-8")).get_vocab(with_added_tokens=False))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigurationError(f"{file} is not a tokenizer.json ({first_line(error)[:100]}).") from error


def started_from(model: ModelSource | None, base: GPT, folder: str | Path) -> GPTConfig:
    """Return the shape of a run that starts from ``base``: that of the weights, with the dropout that was asked for.

    Raises:
        ConfigurationError: if another shape was asked for.
    """
    if model is None:
        return base.config
    if not isinstance(model, GPTConfig):
        raise ConfigurationError(
            f"init_from={str(folder)!r} has weights of a reference.GPT, but the Trainer was given "
            f"{getattr(model, '__name__', type(model).__name__)}: give None, and the shape comes from the folder."
        )
    for field in dataclasses.fields(GPTConfig):
        asked, there = getattr(model, field.name), getattr(base.config, field.name)
        # A head that was tied to a StableEmbedding has a weight of its own in the plain model.
        if field.name not in (*FREE, "tie_embeddings", "init_std", "scale_residual_init") and asked != there:
            raise ConfigurationError(
                f"{field.name} is {asked!r}, but the weights of {folder} have {there!r}: leave it out; the shape comes "
                "from the folder."
            )
    return dataclasses.replace(base.config, **{name: getattr(model, name) for name in FREE})


def resumed_finetuning(given: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """Return how a run that goes on from a checkpoint fine-tunes: as the run before did.

    Raises:
        ConfigurationError: if other settings were given.
    """
    saved = checkpoint.load_finetuning(folder)
    if given not in (saved, FinetuneConfig()):
        changed = [f.name for f in dataclasses.fields(saved) if getattr(saved, f.name) != getattr(given, f.name)]
        told = ", ".join(f"{name} is {getattr(given, name)!r} now and was {getattr(saved, name)!r}" for name in changed)
        raise ConfigurationError(
            f"{folder} cannot be resumed with other settings of fine-tuning ({told}): leave them out, or start a run "
            f"of its own with init_from={str(folder)!r}."
        )
    return saved


@torch.no_grad()
def announce(run: Run, base: GPT, pairs: Pairs, folder: str | Path) -> None:
    """Log by how much the first loss of a run differs from that of the model it starts from, if anything changed it.

    Args:
        run: before its first update.
        base: the model that it starts from.
        pairs: the microbatches of its first update, of which the first is computed.
        folder: of the base, for the message.
    """
    if not run.changes or not pairs:
        return
    ids, targets = pairs[0]
    base.to(run.fabric.device)
    sums = []
    for model in (base, run.wrapped):
        with evaluation_mode(model):
            sums.append(batch_loss(model, ids, targets).double().cpu())
    base.to("cpu")
    counted = reduce(run.fabric, count_targets(pairs[:1]).double().cpu(), "sum")
    before, after = (float(reduce(run.fabric, total, "sum") / counted.clamp(min=1)) for total in sums)
    if run.fabric.global_rank > 0:
        return
    logger.warning(
        "start: the first loss is %.4f nats per token, and that of %s is %.4f, so it moves by %+.4f, because of %s",
        *(after, folder, before, after - before, " and ".join(run.changes)),
    )
