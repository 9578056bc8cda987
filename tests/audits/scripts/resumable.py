"""Train a GPT that can be stopped and resumed: weights, optimizer, schedule, generators and place in the data are saved."""

import argparse
import pathlib
import random

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, LENGTH, WIDTH = 73, 20, 32


class Layer(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.n1, self.n2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.proj(y))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.n2(x)))))


class Model(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.Sequential(Layer(WIDTH, 2, dropout), Layer(WIDTH, 2, dropout))
        self.norm, self.head = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, VOCAB, bias=False)
        self.apply(init)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.norm(self.layers(self.tokens(ids) + self.places.weight[: ids.size(1)])))


def init(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


class Data:
    """Rows in an order that is drawn anew for each epoch; `position` is what a checkpoint keeps."""

    def __init__(self, rows, batch, seed):
        g = torch.Generator().manual_seed(seed)
        self.rows = (torch.randint(1, 9, (rows, LENGTH + 1), generator=g).cumsum(1) + torch.arange(rows)[:, None]) % VOCAB
        self.batch, self.seed, self.position = batch, seed, 0

    def next(self):
        per_epoch = len(self.rows) // self.batch
        epoch, index = divmod(self.position, per_epoch)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch))
        self.position += 1
        return self.rows[order[index * self.batch : (index + 1) * self.batch]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("ckpt.pt"))
    parser.add_argument("--resume", type=pathlib.Path)
    args = parser.parse_args()
    random.seed(1)
    torch.manual_seed(1)
    model, data = Model(), Data(48, 4, seed=6)
    decay = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([decay, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 4) * 0.9**n)
    start = 0
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        data.position, start = state["position"], state["step"]
        print(f"resumed from step {start}")
    model.train()
    for step in range(start, args.steps):
        rows = data.next()
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), rows[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        print(f"step {step + 1} loss {loss.item():.4f} lr {scheduler.get_last_lr()[0]:.2e}")
        if (step + 1) % args.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            state |= {"rng": torch.get_rng_state(), "position": data.position, "step": step + 1}
            torch.save(state, args.out)


if __name__ == "__main__":
    main()
