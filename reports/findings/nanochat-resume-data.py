"""nanochat: a resume leaves out the documents that were read ahead: some thousand, which the state counts as seen."""

import tempfile

from nanochat_run import Run, write_data

with tempfile.TemporaryDirectory() as folder:
    write_data(folder)
    run = Run(folder, num_iterations=4, save_every=2)
    print("uninterrupted, updates 1 to 4, documents:", run.documents)
    run = Run(folder, num_iterations=4, resume_from_step=2)
    print("resumed after update 2, updates 3 and 4: ", run.documents)
