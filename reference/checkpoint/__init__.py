"""Checkpoints: one folder each, written whole or not at all, checked when it is read.

folder.py    write, find, prune and read checkpoint folders
weights.py   tensors in safetensors: each once, ties by name; whether they fit a model

It imports the wings model and finetuning, and reference.config, reference.errors and reference.files.
"""

from reference.checkpoint.folder import checkpoints as checkpoints
from reference.checkpoint.folder import find as find
from reference.checkpoint.folder import load_config as load_config
from reference.checkpoint.folder import load_finetuning as load_finetuning
from reference.checkpoint.folder import load_for_inference as load_for_inference
from reference.checkpoint.folder import load_model as load_model
from reference.checkpoint.folder import load_state as load_state
from reference.checkpoint.folder import load_weights as load_weights
from reference.checkpoint.folder import number as number
from reference.checkpoint.folder import prune as prune
from reference.checkpoint.folder import save as save
from reference.checkpoint.folder import step_folder as step_folder
from reference.errors import CheckpointError as CheckpointError
from reference.files import require_alone as require_alone
from reference.files import require_writable as require_writable
