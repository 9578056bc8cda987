"""Train with the gradient of each sample clipped and noise added (DP-SGD): by torch.func, with no backward."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

V, T, B, C = 40, 16, 6, 16
torch.manual_seed(3)
text = torch.randint(1, 4, (4000,)).cumsum(0) % V


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.mix, self.head = nn.Embedding(V, C), nn.Linear(2 * C, C), nn.Linear(C, V)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim == 2 else nn.init.zeros_(p)

    def forward(self, ids):
        x = self.wte(ids)
        return self.head(x + F.gelu(self.mix(torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1], x], -1))))


model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)


def loss_of(params, ids, targets):
    return F.cross_entropy(functional_call(model, params, (ids[None],))[0], targets)


gradients = vmap(grad(loss_of), in_dims=(None, 0, 0))
for step in range(7):
    batch = torch.stack([text[i : i + T + 1] for i in torch.randint(len(text) - T - 1, (B,))])
    found = gradients({n: p.detach() for n, p in model.named_parameters()}, batch[:, :-1], batch[:, 1:])
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
    factors = (1.0 / norms).clamp(max=1.0)
    for name, p in model.named_parameters():
        total = torch.einsum("b,b...->...", factors, found[name])
        p.grad = (total + 0.01 * torch.randn_like(p)) / B
    optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(batch[:, :-1]).view(-1, V), batch[:, 1:].reshape(-1))
    print(f"step {step} loss {loss.item():.4f}")
