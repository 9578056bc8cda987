"""Optimizers: build one from its class path, group its parameters, and keep its state.

build.py      class path -> optimizer: keywords checked, ``fused`` added where it works
decay.py      which tensors weight decay is for
override.py   bitsandbytes without its process-wide list of tensors with 32-bit state
state.py      the state, to a checkpoint and back

It imports reference.config and reference.errors, and no other wing.
"""

from reference.optimizers.build import build_optimizer, create_optimizer, find_class
from reference.optimizers.decay import decay_groups
from reference.optimizers.state import load_optimizer_state, optimizer_state

__all__ = [
    "build_optimizer",
    "create_optimizer",
    "decay_groups",
    "find_class",
    "load_optimizer_state",
    "optimizer_state",
]
