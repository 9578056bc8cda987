"""A reference GPT and its training loop: small enough to read, and right in every promise.

Every promise made here is a clause of the conformance suite next door, so it can fail and is
watched. The public names are few::

    from reference import GPT, GPTConfig, TrainConfig, Trainer

    trainer = Trainer(GPTConfig.tiny(), TrainConfig(updates=100))
    result = trainer.fit(train_batches, validation_batches)

Names are loaded on first use, so that ``import reference`` costs nothing until torch is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference.checkpoint import CheckpointError, load_for_inference
    from reference.config import ConfigurationError, GPTConfig, TrainConfig
    from reference.embedding import restore_embeddings, swap_embeddings
    from reference.model import GPT
    from reference.optimizer import build_optimizer, decay_groups
    from reference.trainer import FitResult, Trainer
    from reference.update import TrainingError

_HOME = {
    "CheckpointError": "checkpoint",
    "ConfigurationError": "config",
    "FitResult": "trainer",
    "GPT": "model",
    "GPTConfig": "config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "TrainingError": "update",
    "build_optimizer": "optimizer",
    "decay_groups": "optimizer",
    "load_for_inference": "checkpoint",
    "restore_embeddings": "embedding",
    "swap_embeddings": "embedding",
}

__all__ = [
    "GPT",
    "CheckpointError",
    "ConfigurationError",
    "FitResult",
    "GPTConfig",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "decay_groups",
    "load_for_inference",
    "restore_embeddings",
    "swap_embeddings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reference' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}.")
    return getattr(import_module(f"reference.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
