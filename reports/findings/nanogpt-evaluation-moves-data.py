"""nanoGPT: how often a run evaluates decides which windows it trains on: both draw from the same generator."""

import tempfile

from nanogpt_run import Run

for eval_interval in (2, 1000):
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, max_iters=3, eval_interval=eval_interval)
    print(f"eval_interval={eval_interval}, updates 1 to 4, windows begin at:", run.starts[:4])
