"""nanoGPT: the loss that is printed for an update is that of its last microbatch alone."""

import tempfile

from nanogpt_run import Run

with tempfile.TemporaryDirectory() as folder:
    run = Run(folder, max_iters=2, gradient_accumulation_steps=4, eval_interval=1000, learning_rate=1e-2)
printed = [line.split(",")[0] for line in run.printed if line.startswith("iter ")]
for number, line in enumerate(printed):
    losses = run.losses[4 * number : 4 * number + 4]
    print(f"{line}; microbatches {', '.join(f'{x:.4f}' for x in losses)}; mean {sum(losses) / 4:.4f}")
