"""16-bit training with autocast and a GradScaler, with activation checkpointing and gradient accumulation."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

device, dtype = "cpu", torch.float16
vocab, width, heads, depth, length = 53, 32, 2, 2, 16
rows, micro_steps, steps, clip = 4, 2, 7, 1.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, ids):
        x = self.embed(ids) + self.place(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


def batch(generator):
    start = torch.randint(vocab, (rows, 1), generator=generator)
    ids = (start + torch.randint(1, 5, (rows, length + 1), generator=generator).cumsum(1)) % vocab
    return ids[:, :-1].to(device), ids[:, 1:].to(device)


def train():
    torch.manual_seed(17)
    model = LM().to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": other, "weight_decay": 0.0}], lr=2e-3, weight_decay=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
    data = torch.Generator().manual_seed(8)
    for step in range(steps):
        optimizer.zero_grad()
        reported = 0.0
        for _ in range(micro_steps):
            x, y = batch(data)
            with torch.autocast(device, dtype=dtype):
                logits = model(x)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()) / micro_steps
            scaler.scale(loss).backward()
            reported += loss.item()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        print(f"step {step} loss {reported:.4f} grad_norm {norm:.3f} scale {scaler.get_scale():.0f}")


if __name__ == "__main__":
    train()
