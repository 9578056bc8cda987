"""nanochat: one NaN in the gradient of one update, and from the next one on all weights are NaN; the run goes on."""

import tempfile

import torch
from nanochat_run import Run, write_data
from torch.nn.modules.module import register_module_forward_pre_hook

calls = 0


def damage(module, args):
    """Make NaN of the gradient of one scalar in the second update, as an overflow would."""
    global calls
    if type(module).__name__ == "GPT" and torch.is_grad_enabled():
        calls += 1
        if calls == 2:
            module.backout_lambda.register_hook(lambda gradient: gradient * torch.nan)


register_module_forward_pre_hook(damage)
with tempfile.TemporaryDirectory() as folder:
    write_data(folder)
    run = Run(folder, num_iterations=4)
for number, weights in enumerate(run.updates, start=1):
    wrong = sum(int((~tensor.isfinite()).sum()) for tensor in weights)
    print(f"update {number}: {wrong} of {sum(tensor.numel() for tensor in weights)} weights are not finite")
