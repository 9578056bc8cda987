"""Master copies: tensors that an optimizer moves in the model's place, and that are copied back after its step.

ZeRO-1 and ZeRO-2 hold one flat float32 tensor for each parameter group, of which each process has a share
(arXiv:1910.02054); other loops hold one float32 copy for each 16-bit tensor. Which part of the model each of them holds
is found by content: at the first step a master copy has the values of what it stands for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conformance.recording.trace import Group, Named, Step, Trace, Update


@dataclass(frozen=True)
class Part:
    """A stretch of a master copy, and the stretch of the model's tensor that it holds: in elements, both flattened."""

    master: Tensor
    start: int
    tensor: Tensor
    begin: int
    length: int

    def of(self, value: Tensor) -> Tensor:
        """Return the stretch of what has the master's shape, in the tensor's shape; 0 where other processes hold it."""
        found = value.detach().reshape(-1)[self.start : self.start + self.length]
        if self.length < self.tensor.numel():
            whole = found.new_zeros(self.tensor.numel())
            whole[self.begin : self.begin + self.length] = found
            found = whole
        return found.view(self.tensor.shape)


class Masters:
    """The master copies of one recording."""

    def __init__(self, flat_only: bool) -> None:
        """Begin. With ``flat_only``, copies with the shape of the tensor that they stand for are left alone."""
        self.flat_only = flat_only
        self.parts: dict[int, list[Part]] = {}  # by the identity of the master, which the parts keep alive
        self.strangers: dict[int, Tensor] = {}  # tensors that are no master copies

    def look(self, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
        """Find what the tensors that are new among those of an optimizer stand for."""
        own = {id(tensor) for tensor in tensors.values()}
        held = {id(tensor): tensor for group in optimizer.param_groups for tensor in group["params"]}
        new = {key: t for key, t in held.items() if key not in own | self.parts.keys() | self.strangers.keys()}
        if not new:
            return
        taken = {id(part.tensor) for parts in self.parts.values() for part in parts}
        free = [t for t in tensors.values() if t.requires_grad and is_plain(t) and id(t) not in taken | held.keys()]
        for key, master in new.items():
            parts = find_parts(master, free) if is_plain(master) else []
            if not parts or (self.flat_only and any(part.tensor.shape == master.shape for part in parts)):
                self.strangers[key] = master
                continue
            self.parts[key] = parts
            free = [tensor for tensor in free if all(tensor is not part.tensor for part in parts)]

    def held_by(self, group: Mapping[str, Any]) -> list[Tensor]:
        """Return the tensors of a parameter group, the model's in place of their master copies."""
        return list(chain.from_iterable(self.stood_for(tensor) for tensor in group["params"]))

    def stood_for(self, tensor: Tensor) -> list[Tensor]:
        """Return what a tensor of an optimizer stands for: itself, if it is no master copy."""
        return [part.tensor for part in self.parts[id(tensor)]] if id(tensor) in self.parts else [tensor]

    def of(self, optimizer: Any) -> list[Part]:
        """Return the parts that an optimizer holds now."""
        return [part for group in optimizer.param_groups for t in group["params"] for part in self.parts.get(id(t), ())]

    def gradients(self, optimizer: Any) -> dict[int, Tensor]:
        """Return the gradients that its master copies have, by the identity of the model's tensors."""
        found = ((part, part.master.grad) for part in self.of(optimizer))
        return {id(part.tensor): part.of(gradient) for part, gradient in found if gradient is not None}

    def seen(self, optimizer: Any) -> Any:
        """Return the optimizer, or something with its groups and its state by the model's tensors."""
        parts = self.of(optimizer)
        if not parts:
            return optimizer
        state = dict(getattr(optimizer, "state", {}))
        for part in parts:
            entry = state.get(part.master, {})
            state[part.tensor] = {
                key: part.of(value) if isinstance(value, Tensor) and value.shape == part.master.shape else value
                for key, value in entry.items()
            }
        groups = [{**group, "params": self.held_by(group)} for group in optimizer.param_groups]
        return SimpleNamespace(param_groups=groups, state=state)

    def shares(self, names: Mapping[int, str]) -> dict[str, tuple[int, int]]:
        """Return the elements of each tensor that this process holds in a master copy, by name."""
        parts = chain.from_iterable(self.parts.values())
        return {names[id(p.tensor)]: (p.begin, p.begin + p.length) for p in parts if id(p.tensor) in names}


def is_plain(tensor: Tensor) -> bool:
    """Return True for a dense tensor whose content this process can read."""
    return not tensor.is_meta and not hasattr(tensor, "placements") and not tensor.is_sparse and tensor.is_contiguous()


def find_parts(master: Tensor, tensors: list[Tensor]) -> list[Part]:
    """Return the parts of tensors that a master copy holds: of one memory, or whole tensors in the model's order."""
    flat, here = master.detach().reshape(-1), [tensor for tensor in tensors if tensor.device == master.device]
    families: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for tensor in here:
        families.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor)
    for members in families.values():
        if parts := parts_of_memory(master, flat, members):
            return parts
    return parts_in_order(master, flat, here)


def parts_of_memory(master: Tensor, flat: Tensor, views: list[Tensor]) -> list[Part]:
    """Return the parts of the tensors of one memory, if a master copies this process's share of it, or a stretch."""
    first, size, shared = views[0], flat.numel(), len(views) > 1
    memory = torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage())
    running = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
    # This process's own share before all others: shares of ones and zeros are alike.
    offsets = [rank * size] if size * world == memory.numel() else []
    offsets += range(0, memory.numel(), size) if shared and memory.numel() % size == 0 else []
    offsets += [int(view.storage_offset()) for view in views] if shared else []
    copied = flat.to(first.dtype)
    for offset in dict.fromkeys(offsets):
        if offset + size <= memory.numel() and torch.equal(memory[offset : offset + size], copied):
            return list(cut(master, views, offset, size))
    return []


def cut(master: Tensor, views: list[Tensor], offset: int, size: int) -> Iterator[Part]:
    """Yield what of each view lies in ``size`` elements of its memory from ``offset`` on."""
    for view in views:
        at = int(view.storage_offset())
        begin, end = max(at, offset), min(at + view.numel(), offset + size)
        if begin < end:
            yield Part(master, begin - offset, view, begin - at, end - begin)


def parts_in_order(master: Tensor, flat: Tensor, tensors: list[Tensor]) -> list[Part]:
    """Return the tensors, whole and in the model's order, that stand one after the other in a master; 0 may follow."""
    parts, at, left = list[Part](), 0, list(tensors)
    while at < flat.numel():
        found = next((tensor for tensor in left if begins_with(flat[at:], tensor)), None)
        if found is None:
            break
        parts.append(Part(master, at, found, 0, found.numel()))
        left = [tensor for tensor in left if tensor is not found]
        at += found.numel()
    return parts if not flat[at:].any() else []


def begins_with(flat: Tensor, tensor: Tensor) -> bool:
    """Return True if a flat tensor begins with the values of another, in the other's dtype."""
    size = tensor.numel()
    return 0 < size <= flat.numel() and torch.equal(flat[:size].to(tensor.dtype), tensor.detach().reshape(-1))


def complete(traces: list[Trace]) -> None:
    """Give the trace of each rank what the others hold in their shares of the master copies: gradients and state."""
    if not any(trace.shares for trace in traces):
        return
    whole = [together(updates, traces) for updates in zip(*(trace.updates for trace in traces))]
    for trace in traces:
        trace.updates[: len(whole)] = [
            replace(update, steps=steps, gradients=gradients, masters=masters, state_before=before, state_after=after)
            for update, (steps, gradients, masters, before, after) in zip(trace.updates, whole)
        ]


def together(updates: tuple[Update, ...], traces: list[Trace]) -> Any:
    """Return the steps, gradients, master copies and states of an update as they are on all ranks together."""
    first, shares, masters = updates[0], [trace.shares for trace in traces], Named[Tensor]()
    names = [name for name in traces[0].tensors if any(name in share for share in shares)]
    gradients, before, after = Named(first.gradients), dict(first.state_before), dict(first.state_after)
    for name in names:
        holders = [update for update, share in zip(updates, shares) if name in share]
        found = [update.gradients[name] for update in holders]
        gradients[name] = None if any(value is None for value in found) else summed(found)
        if all(name in update.masters for update in holders):
            masters[name] = summed([update.masters[name] for update in holders])
        for state, kind in ((before, "state_before"), (after, "state_after")):
            entries = [getattr(update, kind)[name] for update in holders if name in getattr(update, kind)]
            if entries:
                state[name] = {
                    key: summed([entry[key] for entry in entries]) if same_shape(value, traces[0], name) else value
                    for key, value in entries[0].items()
                }
    steps = tuple(map(joined, zip(*(update.steps for update in updates))))
    return steps, gradients, masters, before, after


def summed(values: list[Any]) -> Tensor:
    """Return the sum of parts, each 0 where it holds nothing."""
    return torch.stack(values).sum(0) if len(values) > 1 else values[0]


def same_shape(value: Any, trace: Trace, name: str) -> bool:
    """Return True for state that has the tensor's shape."""
    return isinstance(value, Tensor) and tuple(value.shape) == trace.tensors[name].shape


def joined(steps: tuple[Step, ...]) -> Step:
    """Return a step with the groups of all ranks, group by group."""
    groups = []
    for same in zip(*(step.groups for step in steps)):
        names = dict.fromkeys(chain.from_iterable(group.tensors for group in same))
        groups.append(Group(tuple(names), same[0].settings))
    return replace(steps[0], groups=tuple(groups))
