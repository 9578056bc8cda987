"""Where the batches of a run come from, what they look like, and whether they fit the model."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from reference import checkpoint
from reference.config import IGNORE, GPTConfig
from reference.data.tokens import Batch
from reference.errors import ConfigurationError, TrainingError
from reference.model.initialization import derive_seed

Pairs = list[tuple[Tensor, Tensor]]
"""Ids and targets (B, T) of each microbatch of an update, int64."""


@runtime_checkable
class TokenSource(Protocol):
    """Batches that can begin anywhere and are split over ranks, such as reference.TokenData."""

    def batches_from(self, start: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield batches without end, from microbatch ``start`` of this rank on."""

    def once(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and targets (B, T), each target once over all ranks, as many batches on each rank."""


def repeat(batches: Iterable[Batch], seed: int, rank: int) -> Iterator[Batch]:
    """Yield the batches over and over. Each pass is seeded by its number: a shuffling DataLoader repeats its order.

    Raises:
        TrainingError: if a pass gives none.
    """
    for epoch in itertools.count():
        torch.manual_seed(derive_seed(seed, "epoch", epoch, rank))
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise TrainingError(
                "the training batches ended: give a list, a DataLoader or another iterable that can be read again."
            )


def split_targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch as token ids (B, T) and targets (B, T), int64, on ``device``.

    Raises:
        TrainingError: if the batch has another form.
    """
    if is_tokens(batch) and batch.size(1) >= 2:
        batch = on_device(batch, device)
        return batch[:, :-1], batch[:, 1:]
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(map(is_tokens, batch)):
        ids, targets = (on_device(part, device) for part in batch)
        if ids.shape == targets.shape:
            return ids, targets
    form = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
    raise TrainingError(
        f"a batch has the form {form}: expected integer token ids (B, T + 1), or a pair of ids and targets."
    )


def count_targets(pairs: Pairs) -> Tensor:
    """Return the number of targets that count, of this rank's microbatches: a scalar on their device, int64."""
    return torch.stack([(targets != IGNORE).sum() for _, targets in pairs]).sum()


def on_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Return token ids as int64 on the device, without waiting for it."""
    if device.type == "cuda" and tokens.device.type == "cpu":
        # NOTE a footgun: a copy from pageable memory waits for all that the GPU has to do, non_blocking or not.
        tokens = tokens.pin_memory()
    return tokens.to(device=device, dtype=torch.long, non_blocking=True)


def is_tokens(value: Any) -> TypeGuard[Tensor]:
    """Return whether this is a tensor of integers with two dimensions, neither of them empty."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.numel() > 0 and not value.is_floating_point()


def within_vocabulary(batches: Iterable[Batch], module: nn.Module) -> Iterator[Batch]:
    """Yield the batches, each checked for token ids that a GPT has no row for, unless it lies on a GPU already.

    There an id too large ends in an assertion of the device: looking before would wait for it, and a look that does not
    wait comes after the assertion. TokenData checks its own ids. The vocabulary of other modules is not known.

    Raises:
        TrainingError: for ids or targets beyond the vocabulary; the target -100 is allowed.
    """
    config = getattr(module, "config", None)
    for batch in batches:
        for number, part in enumerate(batch if isinstance(batch, tuple | list) else (batch,)):
            if not isinstance(config, GPTConfig) or not is_tokens(part) or part.device.type != "cpu":
                continue
            values = part[part != IGNORE] if number else part
            low, high = (int(value) for value in values.aminmax()) if values.numel() else (0, 0)
            if low < 0 or high >= config.vocab_size:
                raise TrainingError(
                    f"a batch holds the token id {low if low < 0 else high}, but the model knows 0 to "
                    f"{config.vocab_size - 1}: tokenize the text with the model's tokenizer, or set vocab_size higher."
                )
        yield batch


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

    Vocabularies of equal size fit, and every id would mean something else. Other sources tell nothing to compare.
    """
    trained, given = checkpoint.load_config(folder)["tokenizer"], getattr(source, "tokenizer", None)
    file = getattr(source, "tokenizer_file", None)
    if not isinstance(trained, str) or not isinstance(given, str):
        return
    if trained != given or (file is not None and file.read_bytes() != (folder / trained).read_bytes()):
        raise ConfigurationError(
            f"{folder} was trained with a tokenizer other than that of {source.folder}: the loss would mean "
            "nothing. Prepare the text with the tokenizer of the checkpoint."
        )
