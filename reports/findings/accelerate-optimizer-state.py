"""accelerate: load_state loses all state of GrokAdamW, and says nothing."""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from grokadamw import GrokAdamW


def run(kind, updates, resume, folder):
    accelerator = Accelerator(cpu=True)
    set_seed(1)
    model = torch.nn.Linear(32, 1)
    model, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=1e-2))
    if resume:
        accelerator.load_state(resume)
    for _ in range(updates):
        accelerator.backward(model(torch.ones(1, 32)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(f"{folder}/{updates}")
    return f"{model.weight.sum().item():.7f}"


for kind in (torch.optim.AdamW, GrokAdamW):
    with tempfile.TemporaryDirectory() as folder:
        whole = run(kind, 8, None, folder)
        run(kind, 4, None, folder)
        print(
            f"{kind.__name__:9} sum of weights, not interrupted {whole}, resumed {run(kind, 4, f'{folder}/4', folder)}"
        )
