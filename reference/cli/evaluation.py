"""The loss of a checkpoint over a split, in the units that others use: ``python -m reference evaluate``."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference.checkpoint import load_for_inference
from reference.config import TrainConfig
from reference.data import TokenData
from reference.data.tokenizer import ByteTokenizer
from reference.errors import ConfigurationError
from reference.training.batches import require_tokenizer, require_vocabulary
from reference.training.evaluation import evaluate
from reference.training.launch import launch


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint reached on a split."""

    loss: float
    """Mean cross entropy in nats per token; every token of the split but its first is a target, unless only a part
    of it was evaluated."""
    tokens: int
    """Targets."""
    size: int | None
    """Bytes of text among the targets, where a token is a byte; None for another tokenizer."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits for all targets, the ends of documents included, over the bytes of text."""
        return None if not self.size else self.loss * self.tokens / self.size / math.log(2.0)

    def describe(self) -> str:
        """Return the result as one line of text."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f} nats per token, perplexity {self.perplexity:,.2f}{bits} ({self.tokens:,} tokens)"


def evaluate_checkpoint(
    folder: Path,
    data: Path,
    split: str = "validation",
    microbatch_size: int = 8,
    config: TrainConfig | None = None,
    batches: int | None = None,
) -> Evaluation:
    """Evaluate a checkpoint over a split, in sequences of its block_size, and return what it reached.

    Args:
        folder: the checkpoint.
        data: folder that ``python -m reference prepare`` wrote.
        split: ``train`` or ``validation``.
        microbatch_size: sequences at a time.
        config: its accelerator and precision are used.
        batches: evaluate only so many of the first batches. None: all of the split.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged.
        DataError: if the data is.
        ConfigurationError: if the model was trained on another tokenizer's ids.
    """
    if batches is not None and batches < 1:
        raise ConfigurationError(f"batches is {batches}: give a number of at least 1, or None for all.")
    model = load_for_inference(folder)
    tokens = TokenData(data, split, block_size=model.config.block_size, microbatch_size=microbatch_size, seed=0)
    # No more than there are, however many were asked for: batches of evaluation are filled up to their size.
    tokens.microbatch_size = min(microbatch_size, tokens.sequences + 1)
    require_tokenizer(folder, tokens)
    require_vocabulary(model, tokens)
    fabric = launch(config or TrainConfig())
    loss = evaluate(fabric, fabric.setup_module(model), itertools.islice(tokens.once(), batches))
    targets = tokens.tokens - 1
    if batches is not None:
        targets = min(targets, batches * tokens.microbatch_size * tokens.block_size)
    if tokens.mask is not None:  # targets are of the assistant's turns only, and no chat is in bytes
        targets = int(np.count_nonzero(tokens.mask[1 : targets + 1]))
    if targets < tokens.tokens - 1:
        size = int(np.count_nonzero(tokens.ids[1 : targets + 1] != ByteTokenizer.end_of_document))
    else:  # without reading all of it again; the first token, which is not a target, may be the end of a document
        size = targets - tokens.documents + int(tokens.ids[0] == ByteTokenizer.end_of_document)
    return Evaluation(loss, targets, size if tokens.tokenizer == ByteTokenizer.name else None)
