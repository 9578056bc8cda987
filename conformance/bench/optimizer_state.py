"""What an optimizer keeps: how many bytes it is, and how to begin again without building it anew."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conformance.errors import Unavailable

PAGES = "moments in managed memory, which the peak does not count"

# What the optimizers call their moments; the rest (step, tables of the 8-bit code) is not zero at the start.
MOMENTS = {"exp_avg", "exp_avg_sq", "grok_ema", "state1", "state2", "absmax1", "absmax2"}


def states(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """Yield the state of each parameter, also where GrokAdamW keeps it: in the parameter group."""
    yield from optimizer.state.values()
    for group in optimizer.param_groups:
        yield from group.get("state", {}).values()


def clear_state(optimizer: Optimizer) -> None:
    """Set moments and step count back to zero, in place."""
    for state in states(optimizer):
        for key, value in state.items():
            if key == "step":
                state[key] = value.zero_() if isinstance(value, Tensor) else 0
            elif key in MOMENTS and getattr(value, "is_paged", False):
                from bitsandbytes.functional import fill

                fill(value, 0)  # zeroed by the CPU, it would move there
            elif key in MOMENTS and type(value) is Tensor:
                value.zero_()
            elif key in MOMENTS:
                value.copy_(torch.zeros(value.shape, device=value.device))  # torchao's subclass quantizes


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of an optimizer's state, wherever it lies; what several parameters share counts once."""
    counted: dict[tuple[torch.device, int], int] = {}
    for state in states(optimizer):
        for value in state.values():
            for tensor in plain_tensors(value):
                counted[tensor.device, tensor.data_ptr()] = tensor.nbytes
    return sum(counted.values())


def state_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Return :func:`state_bytes` over the number of parameters."""
    return state_bytes(optimizer) / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that hold a value's memory; a quantized subclass consists of several."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def check_paging(device: torch.device) -> None:
    """Raise Unavailable on a device for which bitsandbytes cannot page an optimizer's state."""
    if device.type != "cuda":
        raise Unavailable("bitsandbytes pages an optimizer's state through CUDA's unified memory only.")


def forget_pages() -> None:
    """Have bitsandbytes forget the paged state of all optimizers, which it keeps for the life of the process."""
    from bitsandbytes.functional import GlobalPageManager

    GlobalPageManager.get_instance().paged_tensors.clear()


def rewind(module: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that brings parameters and optimizer back to where they are now, in place.

    In place, because compiled code knows the tensors by address. The optimizer must be new. The copy is on the CPU, so
    that it does not show in the GPU's memory.
    """
    start = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in module.parameters()]

    @torch.no_grad()
    def back() -> None:
        for parameter, value in start:
            parameter.copy_(value)
        optimizer.zero_grad()
        clear_state(optimizer)

    return back


def optimizer_name(optimizer: Optimizer) -> str:
    """Return its class, and which of PyTorch's implementations steps where there is a choice: ``AdamW (fused)``."""
    name, chosen = type(optimizer).__name__, optimizer.defaults
    if "fused" not in chosen:
        return name
    return f"{name} ({'fused' if chosen['fused'] else 'foreach' if chosen['foreach'] else 'for-loop'})"


def describe_groups(optimizer: Optimizer) -> str:
    """Say how many of the parameters decay, and in how many groups they are."""
    groups = [(sum(p.numel() for p in group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    share = sum(numbers for numbers, decay in groups if decay) / sum(numbers for numbers, _ in groups)
    return f"{share:.1%} of the parameters, in {len(groups)} {'group' if len(groups) == 1 else 'groups'}"
