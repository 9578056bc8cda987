"""nanochat: the loss that is printed is an average over updates of the loss of the last microbatch alone."""

import tempfile

from nanochat_run import LENGTH, Run, write_data

with tempfile.TemporaryDirectory() as folder:
    write_data(folder)
    run = Run(folder, num_iterations=2, total_batch_size=4 * 2 * LENGTH)
printed = [line.split("|")[1].strip() for line in run.printed if line.startswith("step ")]
for number, line in enumerate(printed, start=1):
    losses = run.losses[4 * number - 4 : 4 * number]
    print(f"update {number}: {line}; microbatches {', '.join(f'{x:.6f}' for x in losses)}; mean {sum(losses) / 4:.6f}")
