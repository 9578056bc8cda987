"""What the scripts nanogpt-*.py share: a run of train.py of a checkout, watched by PyTorch's own hooks."""

import contextlib
import io
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

SMALL = {"device": "cpu", "compile": False, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 8, "batch_size": 2,
         "gradient_accumulation_steps": 1, "eval_iters": 1, "lr_decay_iters": 10, "warmup_iters": 0}  # fmt: skip


class Run:
    """What a run of train.py did."""

    def __init__(self, folder, **settings):
        """Run train.py in its checkout, given on the command line; token i of the data has the id i."""
        checkout, self.updates, self.starts, self.losses = Path(sys.argv[1]).resolve(), [], [], []
        if not (checkout / "train.py").exists():
            sys.exit(f"{checkout} is no checkout of nanoGPT: it has no train.py.")
        for split in ("train", "val"):
            np.arange(1000, dtype=np.uint16).tofile(Path(folder, f"{split}.bin"))
        Path(folder, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1000}))
        settings = SMALL | {"out_dir": folder, "dataset": folder} | settings
        handles = [
            register_module_forward_pre_hook(self.called),
            register_module_forward_hook(self.returned),
            register_optimizer_step_post_hook(self.stepped),
        ]
        printed = io.StringIO()
        sys.argv[:], arguments = ["train.py", *(f"--{key}={value}" for key, value in settings.items())], sys.argv[:]
        sys.path.insert(0, str(checkout))
        with contextlib.chdir(checkout), contextlib.redirect_stdout(printed), contextlib.ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            runpy.run_path("train.py", run_name="__main__")
        sys.argv[:], self.printed = arguments, printed.getvalue().splitlines()

    def called(self, module, args):
        if type(module).__name__ == "GPT" and torch.is_grad_enabled():
            self.starts.append(args[0][:, 0].tolist())  # where the windows of this batch begin in the data

    def returned(self, module, args, output):
        if type(module).__name__ == "GPT" and torch.is_grad_enabled():
            self.losses.append(output[1].item())

    def stepped(self, optimizer, args, kwargs):
        self.updates.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
