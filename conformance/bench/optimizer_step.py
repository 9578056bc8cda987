"""The optimizer's step alone, over the real parameter shapes, against the time that the memory needs.

AdamW reads a parameter, its gradient and two moments, and writes all but the gradient. Nothing in it computes long
enough to matter, so the bytes that must move, over the bandwidth of a copy on the same card, are the floor.

To add a row, add a line to VARIANTS.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conformance.bench.case import AGAINST_ITSELF, OPTIMIZER_STEP, Case, Facts, Prepared, Setting
from conformance.bench.models import tensor_shapes
from conformance.bench.optimizer_state import (
    PAGES,
    check_paging,
    clear_state,
    forget_pages,
    state_bytes_per_parameter,
)
from conformance.errors import Unavailable

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
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def bytes_per_parameter(arithmetic: str) -> float:
    """Return the sum that TRAFFIC writes out: ``read p4 g4 m4 v4, write p4 m4 v4`` -> 28."""
    return sum(float(number) for number in re.findall(r"\b[a-z](\d+(?:\.\d+)?)\b", arithmetic))


@dataclass(frozen=True)
class Variant:
    """One optimizer, as a row for each size and dtype."""

    name: str
    path: str  # class path; imported where it is built
    traffic: str  # which moments it keeps: the first half of a key of TRAFFIC
    arguments: Mapping[str, Any]
    quick: bool = False  # measured in a quick run, too
    slow: bool = False  # a step takes seconds: few rounds
    compiles: bool = False  # compiles its step for every shape and dtype, which takes most of its row's time
    paged: bool = False  # keeps its moments in managed memory, which only CUDA has
    note: str = ""


FUSED = "AdamW fused"
TRAVELS = "moments travel to the CPU and back at every step; the floor is that of moments which stay"
VARIANTS = (
    Variant(FUSED, "torch.optim.AdamW", TORCH, {"fused": True}, quick=True),
    Variant("AdamW for-loop", "torch.optim.AdamW", TORCH, {"foreach": False, "fused": False}),
    Variant("AdamW foreach", "torch.optim.AdamW", TORCH, {"foreach": True}, quick=True),
    Variant("bitsandbytes AdamW", "bitsandbytes.optim.AdamW", BITS_32, {}),
    Variant("bitsandbytes AdamW8bit", "bitsandbytes.optim.AdamW8bit", BITS_8, {}, quick=True),
    Variant("AdamW8bit in one launch", "reference.optimizers.adamw8bit.AdamW8bit", BITS_8, {}, quick=True),
    Variant("bitsandbytes PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit", BITS_8, {}, paged=True, note=PAGES),
    Variant("torchao AdamW8bit", "torchao.optim.AdamW8bit", BITS_8, {}, compiles=True),
    Variant("GrokAdamW", "grokadamw.GrokAdamW", GROK, {}, slow=True, note=TRAVELS),
    Variant("GrokAdamW on the device", "reference.optimizers.grokadamw.GrokAdamW", GROK, {}),
)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Return all rows of this group. The first measures the fused AdamW against itself, which is the noise floor."""
    sizes = ["tiny"] if device.type == "cpu" else ["gpt2-124m"] if quick else ["gpt2-124m", "llama-1.2b"]
    found = [make_case(VARIANTS[0], sizes[0], torch.float32, f", {AGAINST_ITSELF}")]
    for size in sizes:
        for dtype in list(SHORT)[: 1 if quick else None]:
            found += [make_case(variant, size, dtype) for variant in VARIANTS if measured(variant, size, quick)]
    return found


def measured(variant: Variant, size: str, quick: bool) -> bool:
    """Return whether an optimizer has rows at a size. At 1.3B a step of the package GrokAdamW takes 13 s."""
    return variant.quick if quick else not (variant.slow and size == "llama-1.2b")


def make_case(variant: Variant, size: str, dtype: torch.dtype, suffix: str = "") -> Case:
    """Return the row of one optimizer, for parameters of one dtype."""
    name, fused = f"{variant.name}, {SHORT[dtype]}{suffix}", f"{FUSED}, {SHORT[dtype]}"
    large = size == "llama-1.2b"
    seconds, budget, compiling = (2.4 if large else 1.2), 1.0, 0.0
    if variant.slow:
        seconds, budget = 6.0, 4.0
    if variant.compiles:
        seconds, budget, compiling = 10.0, 4.0, 20.0  # long leads
    if importlib.util.find_spec(variant.path.partition(".")[0]) is None:
        seconds = compiling = 0.0  # its row says so at once
    return Case(
        group=OPTIMIZER_STEP,
        size=size,
        name=name,
        build=functools.partial(build, variant, size, dtype),
        beside=None if name == fused else fused,
        rounds=3 if variant.slow else 40,
        budget=budget,
        seconds=seconds + compiling,
        graph=f"{variant.name}, {size}, {SHORT[dtype]}" if compiling else "",
        compiling=compiling,
        priority=priority_of(variant, large, dtype),
    )


def priority_of(variant: Variant, large: bool, dtype: torch.dtype) -> int:
    """Return :attr:`Case.priority`. What takes long comes last, each dtype together: it shares what it is beside."""
    if large and variant.compiles:
        return 7 if dtype is torch.float32 else 8
    if variant.compiles and dtype is not torch.float32:
        return 6
    return 5 if large else 1


def build(variant: Variant, size: str, dtype: torch.dtype, setting: Setting) -> Prepared:
    """Build parameters and gradients of the real shapes, filled with random numbers, and an optimizer over them.

    Raises:
        Unavailable: if the optimizer is not installed, or needs a GPU and there is none.
    """
    if variant.paged:
        check_paging(setting.device)
    optimizer_class = find_optimizer(variant.path)
    parameters = [torch.nn.Parameter(torch.empty(s, device=setting.device, dtype=dtype)) for s in tensor_shapes(size)]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = optimizer_class(parameters, lr=1e-4, weight_decay=0.1, **variant.arguments)
    numbers = sum(parameter.numel() for parameter in parameters)
    plain_dtype = str(dtype).removeprefix("torch.")
    arithmetic = TRAFFIC[variant.traffic, plain_dtype]
    facts: Facts = {
        "parameters": numbers,
        "tensors": len(parameters),
        "parameter dtype": plain_dtype,
        "floor bytes per parameter": bytes_per_parameter(arithmetic),
        "floor arithmetic": arithmetic,
        "floor bytes": numbers * bytes_per_parameter(arithmetic),
    }
    if variant.note:
        facts["note"] = variant.note

    def reset() -> None:
        generator = torch.Generator(setting.device).manual_seed(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.02, generator=generator)
                assert parameter.grad is not None
                parameter.grad.normal_(std=1e-3, generator=generator)
        clear_state(optimizer)

    reset()
    return Prepared(
        step=optimizer.step,
        facts=facts,
        reset=reset,
        close=forget_pages if variant.paged else lambda: None,
        inputs=[max(parameters, key=Tensor.numel), *(p.grad for p in parameters[:1] if p.grad is not None)],
        later_facts=lambda: {"state bytes per parameter": state_bytes_per_parameter(optimizer)},
    )


def find_optimizer(path: str) -> Callable[..., Optimizer]:
    """Import a class by its path. Raises Unavailable where it is not installed."""
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Unavailable(f"{package} cannot be imported ({error}): pip install {package}.") from error
    except AttributeError as error:
        raise Unavailable(f"this release of {module} has no {name}.") from error
    return found
