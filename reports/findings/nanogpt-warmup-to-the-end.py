"""nanoGPT: if warmup_iters equals lr_decay_iters, the run ends with a ZeroDivisionError, before its last save."""

import tempfile
from pathlib import Path

from nanogpt_run import Run

with tempfile.TemporaryDirectory() as folder:
    try:
        Run(folder, max_iters=4, warmup_iters=4, lr_decay_iters=4, eval_interval=4)
    except ZeroDivisionError as error:
        print(f"ZeroDivisionError: {error}; ckpt.pt was written: {Path(folder, 'ckpt.pt').exists()}")
