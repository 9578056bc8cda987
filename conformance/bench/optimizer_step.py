"""The optimizer's step alone, over the real parameter shapes, against the time that the memory needs.

AdamW reads a parameter, its gradient and two moments, and writes all but the gradient: nothing in it computes long
enough to matter, so the bytes that must move, over the bandwidth of a copy on the same card, are the floor.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conformance.bench.case import Case, Prepared, Setting, Unavailable
from reference.config import GPTConfig
from reference.model.gpt import GPT

GROUP = "optimizer step"
AGAINST_ITSELF = "against itself"  # the row that gives the noise floor ends in it

SHAPES: dict[str, Callable[[], GPTConfig]] = {
    "gpt2-124m": GPTConfig.gpt2,
    "llama-1.2b": GPTConfig.llama,
    "tiny": GPTConfig.tiny,
}

# Bytes per parameter that must move in one step, as written in the table: p parameter, g gradient, m and v moments,
# a the scale of each block of 256 8-bit moments (4 bytes / 256, for m and for v), e the average of GrokAdamW's
# gradients. Tensors under 4,096 elements have 32-bit moments in bitsandbytes; they are under 0.1 % of a GPT.
TORCH, BITS_32, BITS_8, GROK = "moments like the parameter", "32-bit moments", "8-bit moments", "moments and average"
TRAFFIC: dict[tuple[str, str], str] = {
    (TORCH, "float32"): "read p4 g4 m4 v4, write p4 m4 v4",
    (TORCH, "bfloat16"): "read p2 g2 m2 v2, write p2 m2 v2",
    (BITS_32, "float32"): "read p4 g4 m4 v4, write p4 m4 v4",
    (BITS_32, "bfloat16"): "read p2 g2 m4 v4, write p2 m4 v4",
    (BITS_8, "float32"): "read p4 g4 m1 v1 a0.03125, write p4 m1 v1 a0.03125",
    (BITS_8, "bfloat16"): "read p2 g2 m1 v1 a0.03125, write p2 m1 v1 a0.03125",
    (GROK, "float32"): "read p4 g4 m4 v4 e4, write p4 m4 v4 e4",
    (GROK, "bfloat16"): "read p2 g2 m2 v2 e2, write p2 m2 v2 e2",
}


def bytes_per_parameter(arithmetic: str) -> float:
    """The sum that TRAFFIC writes out: ``read p4 g4 m4 v4, write p4 m4 v4`` -> 28."""
    return sum(float(number) for number in re.findall(r"\b[a-z](\d+(?:\.\d+)?)\b", arithmetic))


@dataclass(frozen=True)
class Variant:
    """One optimizer, as a row."""

    name: str
    path: str
    """Class path; imported where it is built."""
    arguments: Mapping[str, Any]
    traffic: str
    """Which moments it keeps: the first half of a key of TRAFFIC."""
    needs_cuda: str = ""
    """Why it cannot run on a CPU, up to the word CUDA."""
    note: str = ""
    quick: bool = False
    """Measured in a quick run, too."""
    slow: bool = False
    """A step takes seconds: few rounds."""
    compiles: bool = False
    """Compiles its step for every shape and dtype, which takes most of its row's time."""


FUSED = "AdamW fused"
VARIANTS = (
    Variant(FUSED, "torch.optim.AdamW", {"fused": True}, TORCH, quick=True),
    Variant("AdamW for-loop", "torch.optim.AdamW", {"foreach": False, "fused": False}, TORCH),
    Variant("AdamW foreach", "torch.optim.AdamW", {"foreach": True}, TORCH, quick=True),
    Variant("bitsandbytes AdamW", "bitsandbytes.optim.AdamW", {}, BITS_32),
    Variant("bitsandbytes AdamW8bit", "bitsandbytes.optim.AdamW8bit", {}, BITS_8, quick=True),
    Variant(
        "bitsandbytes PagedAdamW8bit",
        "bitsandbytes.optim.PagedAdamW8bit",
        {},
        BITS_8,
        needs_cuda="managed memory needs",
        note="moments in managed memory, which the peak does not count",
    ),
    Variant("torchao AdamW8bit", "torchao.optim.AdamW8bit", {}, BITS_8, compiles=True),
    Variant(
        "GrokAdamW",
        "grokadamw.GrokAdamW",
        {},
        GROK,
        note="moments travel to the CPU and back at every step; the floor is that of moments which stay",
        slow=True,
    ),
)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All rows of this group. The first one measures the fused AdamW against itself: the noise floor."""
    sizes = ["tiny"] if device.type == "cpu" else ["gpt2-124m"] if quick else ["gpt2-124m", "llama-1.2b"]
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    found: list[Case] = []
    for size in sizes:
        for dtype in dtypes:
            if not found:
                found.append(make_case(VARIANTS[0], size, dtype, f", {AGAINST_ITSELF}"))
            found += [make_case(variant, size, dtype) for variant in VARIANTS if not quick or variant.quick]
    return found


def make_case(variant: Variant, size: str, dtype: torch.dtype, suffix: str = "") -> Case:
    """The row of one optimizer, for parameters of one dtype."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    name, fused = f"{variant.name}, {short}{suffix}", f"{FUSED}, {short}"
    large = size == "llama-1.2b"
    seconds = 2.4 if large else 1.2
    if variant.slow:  # at 1.3B in float32 two rounds of 13 to 17 s, and one call before them
        seconds = (48.0 if dtype is torch.float32 else 16.0) if large else 6.0
    installed = importlib.util.find_spec(variant.path.partition(".")[0]) is not None
    compiling = 0.0
    if variant.compiles:
        seconds, compiling = 10.0, 20.0
    return Case(
        group=GROUP,
        size=size,
        name=name,
        build=functools.partial(build, variant, size, dtype),
        beside=None if name == fused else fused,
        rounds=3 if variant.slow else 40,
        budget=(20.0 if large else 4.0) if variant.slow else 4.0 if variant.compiles else 1.0,  # long leads
        seconds=seconds + compiling if installed else 0.0,  # otherwise its row says so
        graph=f"{variant.name}, {size}, {short}" if variant.compiles and installed else "",
        compiling=compiling if installed else 0.0,
        priority=priority_of(variant, large, dtype),
    )


def priority_of(variant: Variant, large: bool, dtype: torch.dtype) -> int:
    """As :attr:`Case.priority`. What takes long comes last, each dtype together: it shares what it is beside."""
    if large and (variant.slow or variant.compiles):
        return 7 if dtype is torch.float32 else 8
    if variant.compiles and dtype is not torch.float32:
        return 6
    return 5 if large else 1


def build(variant: Variant, size: str, dtype: torch.dtype, setting: Setting) -> Prepared:
    """Parameters and gradients of the real shapes, filled with random numbers, and an optimizer over them."""
    if setting.device.type != "cuda" and variant.needs_cuda:
        raise Unavailable(f"{variant.needs_cuda} CUDA.")
    optimizer_class = find_optimizer(variant)
    parameters = [
        torch.nn.Parameter(torch.empty(shape, device=setting.device, dtype=dtype)) for shape in shapes_of(size)
    ]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = optimizer_class(parameters, lr=1e-4, weight_decay=0.1, **variant.arguments)
    numbers = sum(parameter.numel() for parameter in parameters)
    arithmetic = TRAFFIC[variant.traffic, str(dtype).removeprefix("torch.")]
    facts: dict[str, float | str] = {
        "parameters": numbers,
        "tensors": len(parameters),
        "parameter dtype": str(dtype).removeprefix("torch."),
        "floor bytes per parameter": bytes_per_parameter(arithmetic),
        "floor arithmetic": arithmetic,
        "floor bytes": numbers * bytes_per_parameter(arithmetic),
    }
    if variant.note:
        facts["note"] = variant.note

    def reset() -> None:
        # In place: the graph of the captured step holds these addresses.
        generator = torch.Generator(setting.device).manual_seed(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.02, generator=generator)
                assert parameter.grad is not None
                parameter.grad.normal_(std=1e-3, generator=generator)
        clear_state(optimizer)

    def close() -> None:
        if optimizer_class.__module__.startswith("bitsandbytes"):
            importlib.import_module("bitsandbytes.functional").GlobalPageManager.get_instance().paged_tensors.clear()

    reset()
    return Prepared(
        step=optimizer.step,
        facts=facts,
        reset=reset,
        close=close,
        inputs=[max(parameters, key=Tensor.numel), *(p.grad for p in parameters[:1] if p.grad is not None)],
        later_facts=lambda: {"state bytes per parameter": state_bytes(optimizer) / numbers},
    )


def find_optimizer(variant: Variant) -> Callable[..., Optimizer]:
    """Import the class. Raises Unavailable where it is not installed or cannot be used."""
    module, _, name = variant.path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Unavailable(f"{package} cannot be imported ({error}): pip install {package}.") from error
    except AttributeError as error:
        raise Unavailable(f"this release of {module} has no {name}.") from error
    return found  # type: ignore[no-any-return] # what a path leads to


@functools.cache
def shapes_of(size: str) -> tuple[torch.Size, ...]:
    """Shapes of all parameters of a model, each tied one once; built without memory."""
    with torch.device("meta"):
        model = GPT(SHAPES[size]())
    return tuple(parameter.shape for parameter in model.parameters())


def states(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """The state of each parameter, also where GrokAdamW keeps it: in the parameter group."""
    yield from optimizer.state.values()
    for group in optimizer.param_groups:
        yield from group.get("state", {}).values()


# What the optimizers call their moments; the rest (step, tables of the 8-bit code) is not zero at the start.
MOMENTS = {"exp_avg", "exp_avg_sq", "grok_ema", "state1", "state2", "absmax1", "absmax2"}


def clear_state(optimizer: Optimizer) -> None:
    """Moments and step count back to zero, in place."""
    for state in states(optimizer):
        for key, value in state.items():
            if key == "step":
                state[key] = value.zero_() if isinstance(value, Tensor) else 0
            elif key in MOMENTS and getattr(value, "is_paged", False):
                # Zeroed by the CPU, it would move there.
                importlib.import_module("bitsandbytes.functional").fill(value, 0)
            elif key in MOMENTS and type(value) is Tensor:
                value.zero_()
            elif key in MOMENTS:
                value.copy_(torch.zeros(value.shape, device=value.device))  # torchao's subclass quantizes


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state, wherever it lies; what several parameters share counts once."""
    counted: dict[tuple[torch.device, int], int] = {}
    for state in states(optimizer):
        for value in state.values():
            for tensor in plain_tensors(value):
                counted[tensor.device, tensor.data_ptr()] = tensor.nbytes
    return sum(counted.values())


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that hold a value's memory; a quantized subclass consists of several."""
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
