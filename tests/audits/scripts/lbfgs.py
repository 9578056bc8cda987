"""Full-batch LBFGS with a closure, on a model small enough for it."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(6)
V, D, T = 29, 16, 10


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.pos = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D) * 0.02)
        self.ln, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D, bias=False), nn.Linear(D, V, bias=False)
        for m in (self.emb, self.qkv, self.out):
            nn.init.normal_(m.weight, std=0.05)

    def forward(self, ids):
        x = self.emb(ids) + self.pos[: ids.size(1)]
        q, k, v = self.qkv(self.ln(x)).chunk(3, -1)
        return self.out(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


start = torch.randint(V, (24, 1))
ids = (start + torch.randint(1, 4, (24, T + 1)).cumsum(1)) % V
inputs, targets = ids[:, :-1], ids[:, 1:]
model = Tiny()
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=5)


def closure():
    optimizer.zero_grad()
    loss = F.cross_entropy(model(inputs).reshape(-1, V), targets.reshape(-1))
    loss.backward()
    return loss


for epoch in range(6):
    loss = optimizer.step(closure)
    print(f"epoch {epoch} loss {loss.item():.4f}")
