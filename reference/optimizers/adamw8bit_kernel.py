"""The Triton kernels of AdamW8bit: count_kernel, of one small program, and step_kernel, which updates all tensors.

Imported only where there is a GPU. How the work lies in memory::

    owner      [programs]    0 0 0 1 2 2 ...     the tensor that each program works on
    addresses  [tensors, 9]  parameter, state1, state2, absmax1, absmax2, step; elements, group, first program
    gradients  [tensors]     addresses, too
    numbers    [tensors, 8]  beta1, beta2, 1 - beta1, 1 - beta2, rate, eps, keep, skip: what count_kernel leaves

    one program     |<-- 256 elements: one scale ---->|<-- 256 elements: the next ----->|
    parameter       [....|....|....|....              |                                 ]   [....] 16 bytes: what one
    gradient        [....|....|....|....              |                                 ]          thread loads at once
    state1, state2  [cccc|cccc|cccc|cccc              |                                 ]   a byte per element
    absmax1, 2      [a]                               [a]                                   absmax1 = 0: 32-bit state

The tile is one-dimensional, so that all loads, lookups and stores agree on which thread holds which element: nothing
moves between threads but the maximum of each block.

While the 16 bytes per element of a float32 step pass, an H200 has time for some 120 instructions per 32 elements. So
nothing is computed that a table knows: 256 floats for decoding, and dynamic_map.code_table for encoding, which finds
the nearest code exactly, by one lookup, one addition and two shifts. The cells in use stay in the L1 cache.
"""
# ruff: noqa: N803 - what Triton compiles in is written in capitals
# Triton is untyped, and comes with torch for CUDA only:
# mypy: disable-error-code="import-not-found,untyped-decorator,no-untyped-def"

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reference.optimizers.dynamic_map import code_table, dynamic_map

ELEMENT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCKS = 2  # per program, which is one warp: the fastest on an H200, in float32 and in bfloat16
BLOCK, SMALLEST = tl.constexpr(256), tl.constexpr(2.0**-126)  # as in dynamic_map


@triton.jit
def each(per_block, N: tl.constexpr):
    """One value per block, repeated for each of its elements."""
    return tl.reshape(tl.broadcast_to(per_block[:, None], [N // BLOCK, BLOCK]), [N])


@triton.jit
def scale_of(values, N: tl.constexpr):
    """The largest magnitude of each block, and its reciprocal, correctly rounded."""
    scale = tl.maximum(tl.max(tl.reshape(tl.abs(values), [N // BLOCK, BLOCK]), 1), SMALLEST)
    return scale, tl.div_rn(tl.full([N // BLOCK], 1.0, tl.float32), scale)


@triton.jit
def count_kernel(addresses, settings, found_inf, grad_scale, numbers, tensors, GUARDED: tl.constexpr, N: tl.constexpr):
    """Count the step of N tensors and compute, in float64, the numbers: keep * p - rate * m / (sqrt(v) + eps).

    settings are beta1, beta2, lr, eps and weight_decay of each group, float64 [groups, 5].
    """
    tensor = tl.program_id(0) * N + tl.arange(0, N)
    known = tensor < tensors
    row, number = addresses + tensor * 9, numbers + tensor * 8
    counter = tl.load(row + 5, known, 0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, known, 0.0) + 1
    skip, unscale = 0.0, 1.0  # the gradient's scale goes into the factors of the gradient and of its square
    if GUARDED:
        skip = tl.where(tl.load(found_inf) == 0, 0.0, 1.0)
        unscale = 1.0 / tl.load(grad_scale).to(tl.float64)
    tl.store(counter, step - skip, known)
    tl.store(number + 7, tl.zeros([N], tl.float32) + skip, known)
    group = settings + tl.load(row + 7, known, 0) * 5
    beta1, beta2, lr = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    correction = tl.sqrt(1 - tl.exp2(step * tl.log2(beta2)))
    rate = lr * correction / (1 - tl.exp2(step * tl.log2(beta1)))
    tl.store(number, beta1.to(tl.float32), known)
    tl.store(number + 1, beta2.to(tl.float32), known)
    tl.store(number + 2, ((1 - beta1) * unscale).to(tl.float32), known)
    tl.store(number + 3, ((1 - beta2) * unscale * unscale).to(tl.float32), known)
    tl.store(number + 4, rate.to(tl.float32), known)
    tl.store(number + 5, (tl.load(group + 3) * correction).to(tl.float32), known)
    tl.store(number + 6, (1 - lr * tl.load(group + 4)).to(tl.float32), known)


@triton.jit
def step_kernel(
    addresses, gradients, numbers, owner, values1, values2, codes1, codes2,
    P: tl.constexpr, G: tl.constexpr, REGULAR: tl.constexpr, VECTOR: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Update N elements of one tensor. codes1 and codes2 point to the middle of their tables."""
    program = tl.program_id(0)
    tensor = tl.load(owner + program)
    row = addresses + tensor * 9
    start = (program - tl.load(row + 8)) * N  # int64: a tensor may have more than 2**31 elements
    number = numbers + tensor * 8
    left = tl.minimum(tl.load(row + 6) - start, N).to(tl.int32)
    left = tl.where(tl.load(number + 7) == 0, left, 0)  # a skipped step has no elements
    if REGULAR:  # the host has looked: every address is a multiple of 16 bytes, every size one of 8 elements
        left = tl.multiple_of(left, 8)
    aligned: tl.constexpr = 16 if REGULAR else 1
    p = tl.multiple_of(tl.load(row + 0).to(tl.pointer_type(P)), aligned) + start
    g = tl.multiple_of(tl.load(gradients + tensor).to(tl.pointer_type(G)), aligned) + start
    state1, state2, absmax1, absmax2 = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    beta1, beta2, rest1, rest2 = tl.load(number), tl.load(number + 1), tl.load(number + 2), tl.load(number + 3)
    rate, eps, keep = tl.load(number + 4), tl.load(number + 5), tl.load(number + 6)

    # NOTE a footgun: without max_contiguous Triton gives 16 elements to each thread, since codes have one byte, and
    # moves every float32 to another thread before it is stored.
    element = tl.max_contiguous(tl.arange(0, N), VECTOR)
    mask = element < left
    gradient = tl.load(g + element, mask, 0.0).to(tl.float32)
    if absmax1 == 0:
        wide1 = tl.multiple_of(state1.to(tl.pointer_type(tl.float32)), aligned) + start + element
        wide2 = tl.multiple_of(state2.to(tl.pointer_type(tl.float32)), aligned) + start + element
        m = tl.load(wide1, mask, 0.0) * beta1 + rest1 * gradient
        v = tl.load(wide2, mask, 0.0) * beta2 + rest2 * gradient * gradient
        tl.store(wide1, m, mask)
        tl.store(wide2, v, mask)
        update = m / (tl.sqrt(v) + eps)
    else:
        s1 = tl.multiple_of(state1.to(tl.pointer_type(tl.uint8)), aligned) + start + element
        s2 = tl.multiple_of(state2.to(tl.pointer_type(tl.uint8)), aligned) + start + element
        a1 = absmax1.to(tl.pointer_type(tl.float32)) + start // BLOCK + tl.arange(0, N // BLOCK)
        a2 = absmax2.to(tl.pointer_type(tl.float32)) + start // BLOCK + tl.arange(0, N // BLOCK)
        some = tl.arange(0, N // BLOCK) * BLOCK < left
        m = tl.load(values1 + tl.load(s1, mask, 127).to(tl.int32))  # 127 is the signed code of 0, 0 the unsigned one
        v = tl.load(values2 + tl.load(s2, mask, 0).to(tl.int32))
        m = m * each(tl.load(a1, some, 0.0) * beta1, N) + rest1 * gradient
        v = v * each(tl.load(a2, some, 0.0) * beta2, N) + rest2 * gradient * gradient
        update = m / (tl.sqrt(v) + eps)
        scale1, inverse1 = scale_of(m, N)
        scale2, inverse2 = scale_of(v, N)
        bits1 = (m * each(inverse1, N)).to(tl.int32, bitcast=True)
        bits2 = (v * each(inverse2, N)).to(tl.int32, bitcast=True)
        bits1 = bits1 ^ ((bits1 >> 31) & 0x7FFFFFFF)
        tl.store(s1, ((tl.load(codes1 + (bits1 >> 17)) + bits1) >> 17).to(tl.uint8), mask)
        tl.store(s2, ((tl.load(codes2 + (bits2 >> 16)) + bits2) >> 16).to(tl.uint8), mask)
        tl.store(a1, scale1, some)
        tl.store(a2, scale2, some)
    parameter = tl.load(p + element, mask, 0.0).to(tl.float32)  # last: registers decide how many programs run
    tl.store(p + element, (parameter * keep - rate * update).to(P), mask)


class Launch(NamedTuple):
    """What one launch reads on the device, as drawn above, and the kind of its tensors."""

    members: list[int]  # indices of its tensors among those that were laid out
    addresses: Tensor
    owner: Tensor
    p_dtype: torch.dtype
    g_dtype: torch.dtype
    regular: bool  # all addresses are multiples of 16 bytes, all sizes multiples of 8 elements


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting: the allocator of pinned memory keeps the source until it has been read."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def lay_out(identities: list[tuple[Any, ...]], device: torch.device) -> list[Launch]:
    """Divide tensors into kinds, one launch each. See adamw8bit.identity."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, (*_, p_dtype, g_dtype, regular) in enumerate(identities):
        kinds.setdefault((p_dtype, g_dtype, regular), []).append(index)
    launches = []
    for kind, members in kinds.items():
        programs = [-(-identities[index][6] // (BLOCKS * 256)) for index in members]
        first = [0, *itertools.accumulate(programs)]
        rows = [[*identities[index][:8], at] for index, at in zip(members, first, strict=False)]
        owner = torch.repeat_interleave(to_device(torch.tensor(programs), device), output_size=first[-1]).int()
        launches.append(Launch(members, to_device(torch.tensor(rows), device), owner, *kind))
    return launches


def launch_step(launch: Launch, gradients: Tensor, settings: Tensor, guards: list[Tensor] | None) -> None:
    """Count the step and update; ``guards`` are found_inf and grad_scale, float32 scalars, of a guarded step."""
    _, addresses, owner, p_dtype, g_dtype, regular = launch
    device, tensors = addresses.device, len(addresses)
    codes1, codes2 = code_table(True, device), code_table(False, device)
    numbers = torch.empty(tensors, 8, device=device)
    found_inf, grad_scale = guards or (numbers, numbers)
    with torch.cuda.device_of(addresses):
        count_kernel[(triton.cdiv(tensors, 32),)](
            *(addresses, settings, found_inf, grad_scale, numbers, tensors, guards is not None, 32), num_warps=1
        )
        step_kernel[(owner.numel(),)](
            *(addresses, gradients, numbers, owner, dynamic_map(True, device), dynamic_map(False, device)),
            *(codes1[len(codes1) // 2 :], codes2[len(codes2) // 2 :]),
            *(ELEMENT[p_dtype], ELEMENT[g_dtype], regular, 16 // p_dtype.itemsize, BLOCKS * 256),
            num_warps=1,
        )
