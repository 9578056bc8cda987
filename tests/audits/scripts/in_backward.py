"""Optimizer in backward: each weight is updated as soon as its gradient is there, and the gradient is freed."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads = heads

    def forward(self, x):
        b, t, d = x.shape
        h = self.ln1(x)
        q, k, v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(torch.relu(self.up(self.ln2(x))))


class Decoder(nn.Module):
    def __init__(self, vocab=71, d=32, layers=2, heads=4, length=18):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.layers = nn.Sequential(*[Block(d, heads) for _ in range(layers)])
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        return self.out(self.norm(self.layers(x)))


def batches(count, seed, vocab=71, rows=6, length=18):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        start = torch.randint(vocab, (rows, 1), generator=g)
        steps = torch.randint(1, 4, (rows, length + 1), generator=g).cumsum(1)
        ids = (start + steps) % vocab
        yield ids[:, :-1], ids[:, 1:]


def main():
    torch.manual_seed(0)
    model = Decoder()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1 if p.ndim > 1 else 0.0) for p in model.parameters()}

    def step_now(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)

    for i, (x, y) in enumerate(batches(7, seed=3)):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits.permute(0, 2, 1), y)
        loss.backward()
        print(i, "loss", round(loss.item(), 5))


if __name__ == "__main__":
    main()
