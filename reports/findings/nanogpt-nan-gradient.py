"""nanoGPT: one NaN in the gradient of one update, and from then on all weights are NaN; the run goes on."""

import tempfile

import torch
from nanogpt_run import Run
from torch.nn.modules.module import register_module_forward_pre_hook

calls = 0


def damage(module, args):
    """Make NaN of the gradient of the positions in the second update, as an overflow would."""
    global calls
    if type(module).__name__ == "GPT" and torch.is_grad_enabled():
        calls += 1
        if calls == 2:
            module.transformer.wpe.weight.register_hook(lambda gradient: gradient * torch.nan)


register_module_forward_pre_hook(damage)
with tempfile.TemporaryDirectory() as folder:
    run = Run(folder, max_iters=3, grad_clip=1.0, eval_interval=1000)
for number, weights in enumerate(run.updates, start=1):
    wrong = sum(int((~tensor.isfinite()).sum()) for tensor in weights)
    print(f"update {number}: {wrong} of {sum(tensor.numel() for tensor in weights)} weights are not finite")
print(*(line.split(",")[0] for line in run.printed if line.startswith("iter ")), sep="\n")
