"""A reference GPT and its training loop: small enough to read, and right in every promise.

Every promise made here is a clause of the conformance suite next door, so it can fail and is
watched. The public names are few::

    from reference import GPT, GPTConfig, TrainConfig, Trainer

    trainer = Trainer(GPTConfig.tiny(), TrainConfig(updates=100))
    result = trainer.fit(train_batches, validation_batches)

The same from the command line, with data, presets and progress: ``python -m reference --help``.

Names are loaded on first use, so that ``import reference`` costs nothing until torch is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference.checkpoint.folder import CheckpointError, load_for_inference
    from reference.config import ConfigurationError, GPTConfig, TrainConfig
    from reference.data.tokenizer import load_tokenizer
    from reference.data.tokens import DataError, TokenData
    from reference.interchange.huggingface import export_huggingface, import_huggingface
    from reference.model.embedding import restore_embeddings, swap_embeddings
    from reference.model.gpt import GPT
    from reference.optimizers.build import build_optimizer, decay_groups
    from reference.training.trainer import FitResult, Record, Trainer
    from reference.training.update import TrainingError

_HOME = {
    "CheckpointError": "checkpoint.folder",
    "ConfigurationError": "config",
    "DataError": "data.tokens",
    "FitResult": "training.trainer",
    "GPT": "model.gpt",
    "GPTConfig": "config",
    "TrainConfig": "config",
    "Record": "training.trainer",
    "TokenData": "data.tokens",
    "Trainer": "training.trainer",
    "TrainingError": "training.update",
    "build_optimizer": "optimizers.build",
    "decay_groups": "optimizers.build",
    "export_huggingface": "interchange.huggingface",
    "import_huggingface": "interchange.huggingface",
    "load_for_inference": "checkpoint.folder",
    "load_tokenizer": "data.tokenizer",
    "restore_embeddings": "model.embedding",
    "swap_embeddings": "model.embedding",
}

__all__ = [
    "GPT",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "FitResult",
    "GPTConfig",
    "Record",
    "TokenData",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "build_optimizer",
    "decay_groups",
    "export_huggingface",
    "import_huggingface",
    "load_for_inference",
    "load_tokenizer",
    "restore_embeddings",
    "swap_embeddings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reference' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}.")
    return getattr(import_module(f"reference.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
