"""accelerate: with accumulate(), the gradient of a short last window is too small.

Trains on five microbatches, accumulating two each. The loss of a microbatch is its number times the weight; so each
gradient shall be the mean of the numbers of its microbatches.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Linear(1, 1, bias=False)
loader = DataLoader([torch.tensor([number]) for number in (10.0, 2.0, 20.0, 4.0, 30.0)])
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
numbers = []
for number in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(number).sum())
        numbers.append(number.item())
        if accelerator.sync_gradients:
            mean = sum(numbers) / len(numbers)
            print(f"update of microbatches {numbers}: mean {mean}, gradient {model.weight.grad.item()}")
            numbers.clear()
        optimizer.step()
        optimizer.zero_grad()
