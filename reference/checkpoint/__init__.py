"""Checkpoints: one folder each, written whole or not at all, checked when it is read.

folder.py    write, find, prune and read checkpoint folders
weights.py   tensors in safetensors: each once, ties by name; whether they fit a model

It imports the wing model, and reference.config, reference.errors and reference.files.
"""

from reference.checkpoint.folder import (
    checkpoints,
    find,
    load_config,
    load_for_inference,
    load_model,
    load_state,
    load_weights,
    number,
    prune,
    require_writable,
    save,
    step_folder,
)
from reference.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "checkpoints",
    "find",
    "load_config",
    "load_for_inference",
    "load_model",
    "load_state",
    "load_weights",
    "number",
    "prune",
    "require_writable",
    "save",
    "step_folder",
]
