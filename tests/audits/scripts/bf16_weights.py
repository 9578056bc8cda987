"""A model whose weights are bfloat16, trained with float32 copies that the optimizer owns."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(23)
V, D, H, L, T, B, UPDATES, MICRO = 47, 32, 2, 2, 16, 4, 7, 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x):
        h = self.a(x)
        q, k, v = (f(h).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.b(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
        self.layers = nn.ModuleList([Layer() for _ in range(L)])
        self.norm, self.head = nn.RMSNorm(D), nn.Linear(D, V, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight[: ids.size(1)]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batches():
    g = torch.Generator().manual_seed(31)
    while True:
        ids = (torch.randint(V, (B, 1), generator=g) + torch.randint(1, 5, (B, T + 1), generator=g).cumsum(1)) % V
        yield ids[:, :-1], ids[:, 1:]


model = Model().to(torch.bfloat16)
masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0)
data = batches()

for update in range(UPDATES):
    total = 0.0
    for master in masters:
        master.grad = torch.zeros_like(master)
    for _ in range(MICRO):
        x, y = next(data)
        loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten()) / MICRO
        loss.backward()
        total += loss.item()
        for master, p in zip(masters, model.parameters()):
            master.grad += p.grad.float()
            p.grad = None
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    with torch.no_grad():
        for master, p in zip(masters, model.parameters()):
            p.copy_(master)
    print(f"{update}: loss {total:.4f}")
