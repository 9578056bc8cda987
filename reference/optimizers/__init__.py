"""Optimizers: build one from its class path, group its parameters, and keep its state.

adamw8bit.py  AdamW with 8-bit state, one launch for all tensors (adamw8bit_kernel.py, dynamic_map.py)
averages.py   schedule-free: the weights that are trained, and their average that is used
build.py      class -> optimizer: keywords checked, ``fused`` added where it works
classes.py    class path -> class, importing only a module that can hold it
decay.py      which tensors weight decay is for
grokadamw.py  GrokAdamW whose moments stay on the device
override.py   bitsandbytes without its process-wide list of tensors with 32-bit state
roles.py      two optimizers as one: for the matrices of blocks, such as Muon, and for the rest
state.py      the state, to a checkpoint and back

It imports reference.config and reference.errors, and no other wing.
"""

from reference.optimizers.build import build_optimizer as build_optimizer
from reference.optimizers.build import create_optimizer as create_optimizer
from reference.optimizers.classes import find_class as find_class
from reference.optimizers.decay import decay_groups as decay_groups
from reference.optimizers.roles import class_paths as class_paths
from reference.optimizers.roles import roles as roles
from reference.optimizers.state import load_optimizer_state as load_optimizer_state
from reference.optimizers.state import optimizer_state as optimizer_state
