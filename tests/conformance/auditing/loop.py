"""A training script as a stranger writes it, for the tests of the audit."""

SCRIPT = """\
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
V, T, B, C = 32, 12, 4, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(C), nn.Dropout(0.1)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        q, k, v = (t.view(*x.shape[:2], 2, C // 2).transpose(1, 2) for t in self.qkv(self.norm(x)).split(C, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.out(y.transpose(1, 2).reshape(x.shape)))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe, self.blocks = nn.Embedding(V, C), nn.Embedding(T, C), nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.view(-1, V), targets.reshape(-1))


data = torch.randint(V, (2048,))
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
for step in range(6):
    total = 0.0
    for micro in range(2):
        at = torch.randint(len(data) - T - 1, (B,))
        rows = torch.stack([data[i : i + T + 1] for i in at])
        _, loss = model(rows[:, :-1], rows[:, 1:])
        (loss / 2).backward()
        total += loss.item() / 2
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {total:.4f}")
print("done")
"""
