"""Pre-train a small bidirectional encoder by masked tokens, then unfreeze it for a second stage by a new optimizer."""

import torch
from torch import nn
from torch.nn import functional as F

V, T, B, C, MASK = 60, 24, 8, 32, 59
torch.manual_seed(11)
rows = (torch.randint(1, 5, (400, 1)) * torch.arange(1, T + 1) + torch.randint(V, (400, 1))) % (V - 1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.norm1, self.norm2, self.drop = nn.LayerNorm(C), nn.LayerNorm(C), nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, C // 2).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)  # both ways: it fills gaps
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(x.shape)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), nn.LayerNorm(C)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.wte.weight)


model = Encoder().requires_grad_(False)
stages = [[model.layers[1], model.norm], [model.layers[0]], [model.wte, model.wpe]]
order, step = torch.randperm(len(rows)), 0
for stage in range(len(stages)):
    for part in stages[stage]:
        part.requires_grad_(True)
    live = [(depth, p) for depth in range(stage + 1) for part in stages[depth] for p in part.parameters()]
    groups = [{"params": [p], "lr": 2e-3 / 2**depth, "weight_decay": 0.1 * (p.ndim > 1)} for depth, p in live]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        ids = rows[order[step * B : (step + 1) * B]]
        hidden = torch.rand(ids.shape) < 0.2
        seen, labels = ids.masked_fill(hidden, MASK), ids.masked_fill(~hidden, -100)
        loss = F.cross_entropy(model(seen).view(-1, V), labels.view(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in live], 1.0)
        optimizer.step()
        step += 1
        print(f"stage {stage} step {step} loss {loss.item():.4f}")
