"""bitsandbytes: on a CPU with AVX512-BF16, an evaluation cuts the layers of a 4-bit model off from training.

In eval mode, Linear4bit packs its weight anew, in place, for a kernel without autograd. It stays packed when training
goes on: matmul_4bit then takes that kernel in training too. With a bias it raises an error; without one nothing is
said, and what lies before the layer gets no gradient through it.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import has_avx512bf16
from torch import nn

print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, AVX512-BF16: {bool(has_avx512bf16())}")
for bias in (False, True):
    torch.manual_seed(0)
    first = nn.Linear(64, 64)  # as adapters in an earlier layer
    frozen = bitsandbytes.nn.Linear4bit(64, 64, bias=bias, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    frozen.requires_grad_(False)
    model, x = nn.Sequential(first, frozen), torch.randn(8, 64)
    for moment in ("before an evaluation", "after it"):
        try:
            output = model.train()(x)
            result = "no gradient at all" if not output.requires_grad else "a gradient"
            if output.requires_grad:
                (gradient,) = torch.autograd.grad(output.square().sum(), first.weight, allow_unused=True)
                result = "no gradient" if gradient is None else f"a gradient of norm {float(gradient.norm()):.1f}"
        except RuntimeError as error:
            result = f"RuntimeError: {error}"
        print(f"bias={bias}, {moment}: {result}; bytes of the weight sum up to {int(frozen.weight.data.long().sum())}")
        with torch.no_grad():
            model.eval()(x)
