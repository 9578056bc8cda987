"""bitsandbytes: on the CPU, 4-bit weights whose rows are not a multiple of the block come back with wrong scales.

quantize_4bit gives each 64 elements in memory one scale, across the ends of rows. The CPU's dequantize_4bit counts the
blocks row by row, so from the second row on it takes the scales of other blocks. The error of nf4 is 9 %; it becomes 22
to 37 %, without a message, for every layer whose number of inputs is not a multiple of 64.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
for kind in ("nf4", "fp4"):
    for inputs in (32, 64, 96, 128, 160, 192):
        weight = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0))
        packed, state = quantize_4bit(weight, quant_type=kind)
        library = dequantize_4bit(packed, state)
        # By hand: the high half of each byte first, and one scale for each 64 elements in memory.
        codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten().long()
        hand = (state.code[codes].view(-1, 64) * state.absmax.view(-1, 1)).view(64, inputs)
        errors = [f"{float((each - weight).norm() / weight.norm()):.3f}" for each in (library, hand)]
        print(f"{kind}, {inputs:3} inputs: error of the library's weight {errors[0]}, by hand {errors[1]}")
