"""Weights as safetensors wants them, each tensor once and ties by name, and whether they fit a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_weights(state_dict: Mapping[str, Any], path: Path) -> None:
    """Write tensors of any device to a safetensors file.

    Safetensors refuses memory that is shared. Of several names of one tensor the first is written, the others stand
    in the file's metadata as ``{name: first name}``, as safetensors' own save_model has it. Tensors that overlap
    otherwise, such as two halves of a buffer, are copied.

    Raises:
        TypeError: if there is anything but tensors, such as a module's extra state.
        safetensors.SafetensorError: if the disk does not take it.
    """
    from safetensors.torch import save_file

    first = first_names(state_dict)
    kept = {name: tensor for name, tensor in state_dict.items() if first[name] == name}
    memory = [tensor.untyped_storage().data_ptr() for tensor in kept.values()]
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format) if memory.count(pointer) > 1 else tensor.contiguous()
        for (name, tensor), pointer in zip(kept.items(), memory, strict=True)
    }
    save_file(tensors, path, metadata={name: other for name, other in first.items() if name != other})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file on the CPU, mapped from it; tied names share one tensor."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a dict
        ties = file.metadata() or {}
    return tensors | {name: tensors[kept] for name, kept in ties.items() if kept in tensors}


def first_names(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """Return for every name the alphabetically first one of the same tensor; raise TypeError for all but tensors."""
    first: dict[Any, str] = {}
    names: dict[str, str] = {}
    for name in sorted(state_dict):
        tensor = state_dict[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} in the state dict of the module is a {type(tensor).__name__}, not a tensor")
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        names[name] = first.setdefault(key if tensor.data_ptr() else name, name)  # 0: empty, or on the meta device
    return names


def misfit(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return how saved tensors differ from a model's own in names, ties and shapes; empty if they fit."""
    lacks, more = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if lacks or more:
        return f"another model: it lacks {shorten(lacks)}, and has {shorten(more)}, which this one does not have"
    there, here = first_names(saved), first_names(own)
    for name in own:
        if there[name] != name and here[name] == name:
            return f"another model: {name} is tied to {there[name]} there, and a tensor of its own here"
        # A sharded model is gathered name by name: what was tied may come as two tensors, which are equal.
        if there[name] == name and here[name] != name and not torch.equal(saved[name], saved[here[name]]):
            return f"another model: {name} is a tensor of its own there, and tied to {here[name]} here"
    shapes = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if saved[name].shape != own[name].shape and here[name] == name
    ]
    return f"a model of another shape: {shorten(shapes)}" if shapes else ""


def shorten(entries: list[str]) -> str:
    """Return the first three of a list, and how many more there are."""
    more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
    return (", ".join(entries[:3]) or "nothing") + more
