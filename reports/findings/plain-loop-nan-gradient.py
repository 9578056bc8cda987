"""A plain loop: one NaN in one gradient, and one update later all weights are NaN; the loop goes on.

The loop of many a tutorial: forward, backward, step. The gradient of one weight gets a NaN in update 2 of 4, as an
overflow would put it there.
"""

import torch
from torch import nn

torch.manual_seed(1)
model = nn.Sequential(nn.Embedding(128, 32), nn.Linear(32, 32), nn.Linear(32, 128))
optimizer = torch.optim.AdamW(model.parameters())
for update in range(1, 5):
    ids = torch.randint(128, (2, 17))
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    if update == 2:
        model[1].weight.grad[0, 0] = torch.nan
    optimizer.step()
    count = sum(int((~p.isfinite()).sum()) for p in model.parameters())
    print(f"update {update}: loss {loss.item():.4f}, weights that are not finite afterwards: {count}")
