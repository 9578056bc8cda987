"""The dynamic map: 256 values in [-1, 1] or [0, 1]; a number becomes one byte, the code of the value nearest to it.

The values are those of bitsandbytes (Dettmers 2015, https://arxiv.org/abs/1511.04561): seven decades, each cut into
twice as many equal parts as the one below. Blocks of 256 numbers share a scale, their largest magnitude (Dettmers et
al. 2022, https://arxiv.org/abs/2110.02861).
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
SMALLEST = 2.0**-126  # least scale: the smallest normal float32, whose reciprocal is finite


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """Return the values in ascending order, float32 [256]. The index of a value is its code."""
    values = [0.0, 1.0]
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        parts = 10.0 ** (decade - 6) * ((borders[:-1] + borders[1:]) / 2.0)
        values += parts.tolist() + ((-parts).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def midpoints(signed: bool, device: torch.device) -> Tensor:
    """Return, for each pair of neighbours, the largest float32 that is not nearer to the upper one, [255]."""
    values = dynamic_map(signed, torch.device("cpu")).double()
    exact = (values[:-1] + values[1:]) / 2
    rounded = exact.float()
    lower = torch.nextafter(rounded, torch.tensor(-torch.inf))
    return torch.where(rounded.double() > exact, lower, rounded).to(device)


def nearest(numbers: Tensor, signed: bool) -> Tensor:
    """Return the codes of the nearest values; of the lower one amid two."""
    return torch.bucketize(numbers, midpoints(signed, numbers.device)).to(torch.uint8)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Return the numbers, float32 [elements], of codes, uint8 [elements], and scales, float32 [blocks]."""
    return dynamic_map(signed, codes.device)[codes.long()] * scales.repeat_interleave(BLOCK)[: codes.numel()]


def encode(numbers: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Write the codes and scales of numbers, float32 [elements]. A NaN has no part in its block's scale."""
    blocks = F.pad(numbers, (0, -numbers.numel() % BLOCK)).view(-1, BLOCK)
    scales.copy_(blocks.nan_to_num(0.0, torch.inf, -torch.inf).abs().amax(1).clamp(min=SMALLEST))
    codes.copy_(nearest((blocks * (1.0 / scales)[:, None]).view(-1)[: numbers.numel()], signed))


@functools.cache
def code_table(signed: bool, device: torch.device) -> Tensor:
    """Return the table by which the kernel finds a code: ``(table[bits >> shift] + bits) >> shift``, int32.

    ``bits`` are a float32's, as an integer (of a negative number all but the sign inverted: then integers lie in the
    order of the floats). What shares all but the last ``shift`` bits is a cell, so small that it holds one midpoint at
    most; beyond the midpoint, and only there, the sum carries into the next code. Cell 0 is in the table's middle.
    """
    shift = 17 if signed else 16
    first = torch.arange(-(2 ** (31 - shift)), 2 ** (31 - shift)) << shift  # of each cell
    last = first + 2**shift - 1
    borders = midpoints(signed, torch.device("cpu")).view(torch.int32)
    borders = (borders ^ ((borders >> 31) & 0x7FFFFFFF)).long()
    code = torch.searchsorted(borders, first)
    inside = torch.searchsorted(borders, last) > code  # whether a midpoint lies within the cell
    border = torch.where(inside, borders[code.clamp(max=254)], last)
    table = (code << shift) + (last - border) - first
    return ((table + 2**31) % 2**32 - 2**31).to(torch.int32).to(device)
