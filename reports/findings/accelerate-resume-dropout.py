"""accelerate: load_state restores the random generators, and the next pass over a loader draws from them.

Trains six updates with dropout, as the guide on checkpointing has it, and resumes after the third: with a DataLoader as
it is, and with one that has a generator of its own.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader


def run(own, resume, folder):
    accelerator = Accelerator(cpu=True)
    set_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    loader = DataLoader(torch.eye(8)[:6], generator=torch.Generator() if own else None)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    if resume:
        accelerator.load_state(f"{folder}/3")
        loader = accelerator.skip_first_batches(loader, 3)
    for update, batch in enumerate(loader, start=4 if resume else 1):
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(f"{folder}/{update}")
    return sum(p.sum().item() for p in model.parameters())


for own in (False, True):
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = run(own, False, folder), run(own, True, folder)
    print(f"generator of its own: {own!s:5} sum of weights, not interrupted {whole:.6f}, resumed {resumed:.6f}")
