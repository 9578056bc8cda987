"""Distil a frozen teacher, with a sum of two losses and sharpness-aware steps: two backward passes on each batch."""

import torch
from torch import nn
from torch.nn import functional as F

V, T, B, C = 50, 20, 8, 24
torch.manual_seed(5)
text = torch.randint(1, 5, (6000,)).cumsum(0) % V


class Recurrent(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.wte, self.head = nn.Embedding(V, C), nn.Linear(C, V)
        self.body = nn.ModuleList(nn.Linear(3 * C, C) for _ in range(layers))
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim == 2 else nn.init.zeros_(p)

    def forward(self, ids):
        x = self.wte(ids)
        for layer in self.body:  # each position sees itself and the two before
            past = F.pad(x, (0, 0, 2, 0))
            x = x + F.gelu(layer(torch.cat([past[:, :-2], past[:, 1:-1], x], -1)))
        return self.head(x)


teacher, student = Recurrent(3).eval().requires_grad_(False), Recurrent(2)
optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
rho, share, warmth = 0.05, 0.5, 2.0


def loss_of(ids, targets):
    logits = student(ids)
    with torch.no_grad():
        wanted = F.log_softmax(teacher(ids) / warmth, -1)
    given = F.log_softmax(logits / warmth, -1)
    distance = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1).mean()
    return share * F.cross_entropy(logits.view(-1, V), targets.reshape(-1)) + (1 - share) * warmth**2 * distance


for step in range(8):
    starts = torch.randint(len(text) - T - 1, (B,))
    batch = torch.stack([text[i : i + T + 1] for i in starts])
    loss = loss_of(batch[:, :-1], batch[:, 1:])
    loss.backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        uphill = [rho * p.grad / (norm + 1e-12) for p in student.parameters()]
        torch._foreach_add_(list(student.parameters()), uphill)
    optimizer.zero_grad()
    loss_of(batch[:, :-1], batch[:, 1:]).backward()
    with torch.no_grad():
        torch._foreach_sub_(list(student.parameters()), uphill)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")
