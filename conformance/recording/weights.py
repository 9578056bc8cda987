"""What a recording keeps of a run's tensors: whole copies on the CPU, or a sketch that stays on the device.

The suite's models are tiny, and their tensors are copied whole. A run that the audit watches may have billions of
weights: of each tensor a sketch keeps 64 elements at places drawn from its size (a name changes with what wraps the
model), its norm and a digest of its bits. A sketch stays on the device until the recording ends, so that the host never
waits for the device. On a sharded tensor it sees the part of its own rank.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from conformance.recording.snapshot import copied, copy_of, describe_state, keyed_by_tensor, plain_value
from conformance.recording.trace import Measures, Named

SAMPLES = 64
"""Elements of each tensor that a sketch keeps."""


class Weights(Protocol):
    """How a recording keeps tensors."""

    keeps_logits: bool

    def keep(self, tensors: Mapping[str, Tensor]) -> Named[Tensor]:
        """Return what is kept of the content of named parameters, gradients or buffers."""

    def measure(self, tensors: Mapping[str, Tensor], bits: bool = True) -> Measures | None:
        """Return figures of whole tensors, where their content is not kept whole; with digests if ``bits``."""

    def keep_small(self, tensor: Tensor) -> Tensor:
        """Return a copy of token ids, or of a loss."""

    def keep_logits(self, logits: Tensor) -> Tensor | None:
        """Return a copy of logits, if they are kept."""

    def keep_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
        """Return what is kept of an optimizer's state, by tensor."""


class Whole:
    """Copies of everything, on the CPU."""

    keeps_logits = True

    def keep(self, tensors: Mapping[str, Tensor]) -> Named[Tensor]:
        return copied(tensors)

    def measure(self, tensors: Mapping[str, Tensor], bits: bool = True) -> Measures | None:
        return None

    def keep_small(self, tensor: Tensor) -> Tensor:
        return copy_of(tensor)

    def keep_logits(self, logits: Tensor) -> Tensor | None:
        return copy_of(logits)

    def keep_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
        return describe_state(optimizer, dict(names))


class Sketch:
    """Samples and figures, on the device of each tensor."""

    keeps_logits = False

    def __init__(self) -> None:
        self.states = False  # whether optimizer state is kept: it doubles what a step costs
        self.places: dict[tuple[int, torch.device], Tensor] = {}

    @torch.no_grad()
    def keep(self, tensors: Mapping[str, Tensor]) -> Named[Tensor]:
        """Return elements of each tensor, in float32 (float64 where the tensor has it), as (n,) with n of 64 at most.

        One launch for each tensor, and one more for all: the samples of a device and dtype are views of one tensor.
        """
        families: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = {}
        with torch._C.DisableTorchFunction():
            for name, tensor in tensors.items():
                if not tensor.is_meta:
                    here = local(tensor)
                    names, samples = families.setdefault((here.device, here.dtype), ([], []))
                    names.append(name)
                    sharded = hasattr(tensor, "placements") and here.shape != tensor.shape
                    samples.append(self.sample_part(tensor, here) if sharded else self.sample(here))
            found = dict[str, Tensor]()
            for (_, dtype), (names, samples) in families.items():
                wide = torch.float64 if dtype in (torch.float64, torch.int64) else torch.float32
                parts = torch.cat(samples).to(wide).split([len(part) for part in samples])
                found.update(zip(names, parts, strict=True))
        return Named({name: found[name] for name in tensors if name in found})

    def sample(self, here: Tensor) -> Tensor:
        """Return elements of a tensor, as (n,): of a small one all."""
        if here.numel() <= SAMPLES:
            return here.reshape(-1)
        return torch.take(here, self.places_in(here.numel(), here.device))

    def sample_part(self, whole: Tensor, part: Tensor) -> Tensor:
        """Return the elements at the places of the whole tensor; NaN where they lie on other processes."""
        offset = torch.tensor(offset_of(whole))
        places = draw(whole.numel()) if whole.numel() > SAMPLES else list(range(whole.numel()))
        inside = torch.stack(torch.unravel_index(torch.tensor(places), whole.shape), dim=1) - offset
        here = ((inside >= 0) & (inside < torch.tensor(part.shape))).all(dim=1)
        found = torch.full((len(places),), torch.nan, dtype=part.dtype, device=part.device)
        if here.any():
            found[here.to(part.device)] = part[tuple(inside[here].to(part.device).T)]
        return found

    def places_in(self, size: int, device: torch.device) -> Tensor:
        """Return the places of the samples in a tensor of so many elements."""
        if (size, device) not in self.places:
            self.places[size, device] = torch.tensor(draw(size), device=device)
        return self.places[size, device]

    @torch.no_grad()
    def measure(self, tensors: Mapping[str, Tensor], bits: bool = True) -> Measures | None:
        with torch._C.DisableTorchFunction():
            kept = {name: local(tensor) for name, tensor in tensors.items() if not tensor.is_meta}
            digests = {name: torch.hash_tensor(tensor) for name, tensor in kept.items()} if bits else {}
            return Measures(norms(kept), Named(digests))

    def keep_small(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return local(tensor).clone()

    def keep_logits(self, logits: Tensor) -> Tensor | None:
        return None

    @torch.no_grad()
    def keep_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
        """Return samples, at the tensor's own places, of state that has the tensor's shape; small state whole."""
        found: dict[str, dict[str, Any]] = {}
        if not self.states:
            return found
        with torch._C.DisableTorchFunction():
            state = getattr(optimizer, "state", {})
            for tensor, entry in state.items() if isinstance(state, Mapping) else ():
                if not isinstance(tensor, Tensor) or id(tensor) not in names or not isinstance(entry, dict):
                    continue
                found[names[id(tensor)]] = {key: self.state_value(tensor, value) for key, value in entry.items()}
        return found

    def state_value(self, tensor: Tensor, value: Any) -> Any:
        """Return what is kept of one entry of an optimizer's state."""
        if not isinstance(value, Tensor):
            return plain_value(value) if not keyed_by_tensor(value) else "a table by tensor"
        if value.shape == tensor.shape and value.is_floating_point():
            return self.keep({"": value})[""].clone()
        return local(value).clone() if value.numel() <= SAMPLES else f"{value.dtype} of shape {tuple(value.shape)}"


def local(tensor: Tensor) -> Tensor:
    """Return a tensor without history: the part of this rank of a DTensor, and the dense form of a sparse one."""
    detached = tensor.detach()
    if hasattr(detached, "to_local"):
        detached = detached.to_local()
    return detached.to_dense() if detached.is_sparse else detached


def offset_of(tensor: Tensor) -> tuple[int, ...]:
    """Return where this process's part of a DTensor begins in the whole, by dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = tensor
    _, offset = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
    return tuple(offset)


def draw(size: int) -> list[int]:
    """Return 64 places below ``size``: always the same, so that two runs can be compared, and spread evenly.

    The whole is cut into 64 parts, and in each part a place is drawn by a fixed multiplication (Knuth, TAOCP 6.4).
    """
    cuts = [size * part // SAMPLES for part in range(SAMPLES + 1)]
    return [start + (part * 2654435761 % 2**32) % (end - start) for part, (start, end) in enumerate(pairwise(cuts))]


def norms(tensors: Mapping[str, Tensor]) -> Named[Tensor]:
    """Return the norm of each tensor, in float32: one launch for all tensors of a device and dtype."""
    families: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            families.setdefault((tensor.device, tensor.dtype), []).append(name)
    found = Named[Tensor]()
    for (_, dtype), members in families.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found.update(zip(members, torch._foreach_norm([tensors[name] for name in members], 2, wide), strict=True))
    return found


def fetched(named: Mapping[str, Tensor]) -> Named[Tensor]:
    """Return the same tensors on the CPU: one copy for each device and dtype."""
    families: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in named.items():
        families.setdefault((tensor.device, tensor.dtype), []).append(name)
    found = dict[str, Tensor]()
    for members in families.values():
        flat = torch.cat([named[name].reshape(-1) for name in members]).cpu()
        parts = flat.split([named[name].numel() for name in members])
        found |= {name: part.reshape(named[name].shape) for name, part in zip(members, parts, strict=True)}
    return Named({name: found[name] for name in named})
