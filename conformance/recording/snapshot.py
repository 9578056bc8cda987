"""Live modules, optimizers and values as plain data: names without the prefixes of wrappers, copies on the CPU."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.recording.trace import EmbeddingInfo, Group, Named, TensorInfo

WRAPPER_PARTS = (
    "_forward_module",
    "_original_module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
WRAPPER_CLASSES = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")  # these call what they wrap ``module``


def describe_group(group: dict[str, Any], names: dict[int, str]) -> Group:
    """Return a parameter group as plain data; state that its class keeps inside is left to describe_state."""
    settings = {k: plain_value(v) for k, v in group.items() if k != "params" and not keyed_by_tensor(v)}
    return Group(tuple(names[id(tensor)] for tensor in group["params"]), settings)


def describe_state(optimizer: Optimizer, names: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Return optimizer state by name: from ``optimizer.state``, and from dictionaries by tensor inside the groups."""
    places = [
        getattr(optimizer, "state", {}),
        *(v for group in optimizer.param_groups for v in group.values() if keyed_by_tensor(v)),
    ]
    entries = {
        names[id(tensor)]: entry
        for place in places
        for tensor, entry in (place.items() if isinstance(place, dict) else ())
        if isinstance(tensor, Tensor) and id(tensor) in names and isinstance(entry, dict) and entry
    }
    copies = iter(copies_of([v for entry in entries.values() for v in entry.values() if isinstance(v, Tensor)]))
    return {
        name: {key: next(copies) if isinstance(value, Tensor) else plain_value(value) for key, value in entry.items()}
        for name, entry in entries.items()
    }


def keyed_by_tensor(value: Any) -> bool:
    """Return True if this is a dictionary with tensors as keys, as grokadamw 0.1.2 keeps its state in a group."""
    return isinstance(value, dict) and any(isinstance(key, Tensor) for key in value)


def find_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the token ids among the arguments: the first integer tensor of two dimensions."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point() and not value.is_meta:
            return value
        if isinstance(value, dict | tuple | list):  # a batch handed over in one piece
            found = find_ids((), value) if isinstance(value, dict) else find_ids(tuple(value), {})
            if found is not None:
                return found
    return None


def find_logits(output: Any, whole: bool = True) -> Tensor | None:
    """Return the logits in a model's output: its first floating tensor of three dimensions, with chunks joined.

    Args:
        output: of the model.
        whole: False if the first chunk will do: joining them takes as much memory as the logits themselves.
    """
    if isinstance(output, Tensor):
        return output if output.ndim == 3 and output.is_floating_point() else None
    if dataclasses.is_dataclass(output) and not isinstance(output, dict | type):
        output = {entry.name: getattr(output, entry.name) for entry in dataclasses.fields(output)}
    if isinstance(output, dict):  # Hugging Face's ModelOutput is one
        output = [output["logits"]] if "logits" in output else list(output.values())
    if isinstance(output, list | tuple):
        tensors = [t for t in output if isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point()]
        if whole and len(tensors) > 1 and len(tensors) == len(output):
            return torch.cat(tensors, dim=1)
        return tensors[0] if tensors else None
    return None


def named_tensors(module: nn.Module, buffers: bool = False) -> dict[str, Tensor]:
    """Return parameters (or buffers) by their names without the prefixes of wrappers; tied ones under the first."""
    # One walk, where named_parameters and wrapper_prefixes take two: a recording asks for this several times an update.
    parts = dict(module.named_modules())
    wrappers = wrapper_prefixes(parts)
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, part in parts.items():
        for name, tensor in (part._buffers if buffers else part._parameters).items():
            if tensor is not None and id(tensor) not in found:
                found[id(tensor)] = f"{prefix}.{name}" if prefix else name, tensor
    return {clean_name(name, wrappers): tensor for name, tensor in found.values()}


def wrapper_prefixes(parts: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the names, with a dot, of those modules that only wrap another one and call it ``module``."""
    return tuple(f"{name}." if name else "" for name, part in parts.items() if type(part).__name__ in WRAPPER_CLASSES)


@functools.lru_cache(maxsize=65536)
def clean_name(name: str, wrappers: tuple[str, ...]) -> str:
    """Return a dotted name without the parts that Fabric, torch.compile, DDP, FSDP and checkpointing add."""
    for prefix in sorted(wrappers, key=len, reverse=True):
        if name.startswith(f"{prefix}module."):
            name = prefix + name[len(prefix) + len("module.") :]
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def describe_tensors(module: nn.Module) -> Named[TensorInfo]:
    """Return what there is to know about each parameter, by its first name."""
    owners = dict(module.named_modules())
    wrappers = wrapper_prefixes(owners)
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), [])
        if (clean := clean_name(name, wrappers)) not in names[id(tensor)]:
            names[id(tensor)].append(clean)
        first.setdefault(id(tensor), (name, tensor))
    infos = [
        TensorInfo(
            name=names[key][0],
            names=tuple(names[key]),
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            device=str(tensor.device),
            trainable=tensor.requires_grad,
            owner=type(owners[name.rpartition(".")[0]]).__name__,
        )
        for key, (name, tensor) in first.items()
    ]
    return Named({info.name: info for info in infos})


def describe_embeddings(module: nn.Module) -> tuple[EmbeddingInfo, ...]:
    """Return what there is to know about each embedding."""
    options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    parts = dict(module.named_modules())
    wrappers = wrapper_prefixes(parts)
    return tuple(
        EmbeddingInfo(
            name=clean_name(name, wrappers),
            kind=class_path(type(child)),
            shape=(child.num_embeddings, child.embedding_dim),
            options=tuple((option, getattr(child, option)) for option in options),
            dtype=child.weight.dtype,
            device=str(child.weight.device),
        )
        for name, child in parts.items()
        if isinstance(child, nn.Embedding)
    )


def class_path(kind: type) -> str:
    """``module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def on_meta(module: nn.Module) -> bool:
    """Return True if the module has parameters without memory, as stacks build them to count operations."""
    return any(parameter.is_meta for parameter in module.parameters())


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a wrapper wraps, whose mode counts: DeepSpeed's engine stays in training mode when it evaluates."""
    inside = module.module if type(module).__name__ in WRAPPER_CLASSES else module
    return inside if isinstance(inside, nn.Module) else module


def same_parameters(first: nn.Module, second: nn.Module) -> bool:
    """Return True if two modules hold the same parameters, as a wrapper and what it wraps do."""
    return first is second or set(map(id, first.parameters())) == set(map(id, second.parameters()))


def holds(module: nn.Module, tensors: set[int]) -> bool:
    """Return True if a module holds all parameters with these identities."""
    return tensors <= {id(parameter) for parameter in module.parameters()}


def device_type(module: nn.Module) -> str:
    """``cpu``, ``cuda``, ... of the module's first parameter or buffer; ``cpu`` if it has none."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        return "cpu" if tensor.is_meta else tensor.device.type
    first = next(module.parameters(), None)
    return "cpu" if first is None or first.is_meta else first.device.type


def copy_of(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, without history."""
    with torch._C.DisableTorchFunction():  # what the recorder itself does is nothing for its gates
        return bare_copy(tensor)


def copied(tensors: Mapping[str, Tensor]) -> Named[Tensor]:
    """Return copies of named tensors."""
    kept = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    return Named(zip(kept, copies_of(list(kept.values())), strict=True))


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies on the CPU, without history: by one call, where all are plain tensors there."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        plain = tensors and hasattr(torch, "_foreach_clone")  # not in every release since 2.11
        if plain and all(type(t) in PLAIN and t.is_cpu and not t.is_sparse for t in tensors):
            return list(torch._foreach_clone(tensors))
        return [bare_copy(tensor) for tensor in tensors]


PLAIN = (Tensor, nn.Parameter)


def bare_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, without history."""
    detached = tensor.detach()
    if hasattr(detached, "full_tensor"):  # a DTensor: every rank records the same gates, so every rank gathers it here
        detached = detached.full_tensor()
    return (detached.to_dense() if detached.is_sparse else detached).to("cpu", copy=True)


def plain_value(value: Any) -> Any:
    """Return a value that can be kept: tensors copied, numbers, text and tuples of them unchanged, the rest as repr."""
    if isinstance(value, Tensor):
        return copy_of(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(plain_value(item) for item in value)
    return repr(value)


def equal_values(first: Any, second: Any) -> bool:
    """Bit equality of two plain values, with NaN equal to itself."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and bits_equal(first, second)
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(equal_values, first, second))
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second):
        return True
    return type(first) is type(second) and bool(first == second)


def bits_equal(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors of one dtype and shape hold the same values; NaN equals NaN, 0.0 equals -0.0."""
    return bool(((first == second) | ((first != first) & (second != second))).all())
