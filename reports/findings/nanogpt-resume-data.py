"""nanoGPT: a resumed run trains on the windows of the first updates again, because it seeds with 1337 again."""

import tempfile

from nanogpt_run import Run

with tempfile.TemporaryDirectory() as folder:
    run = Run(folder, max_iters=6, eval_interval=4)
    print("uninterrupted, updates 1 to 7, windows begin at:", run.starts[:7])
    resumed = Run(folder, max_iters=6, eval_interval=4, init_from="resume")
    print("resumed after update 4, updates 5 to 7:         ", resumed.starts[:3])
