"""nanoGPT: a run makes one update more than max_iters, and what comes after the last eval_interval is not saved."""

import tempfile
from pathlib import Path

import torch
from nanogpt_run import Run

for max_iters, eval_interval in ((4, 2), (5, 2)):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, max_iters=max_iters, eval_interval=eval_interval)
        saved = torch.load(Path(folder, "ckpt.pt"))["iter_num"]
    print(f"max_iters={max_iters}, eval_interval={eval_interval}: {len(run.updates)} updates, {saved} of them saved")
