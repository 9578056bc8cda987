"""A speed-run style loop: Muon for the matrices inside the blocks, AdamW for embedding, head and gains."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Hyperparameters:
    vocab, dim, depth, heads, length = 67, 32, 2, 2, 20
    batch, steps, accumulate = 4, 7, 2
    adam_lr, muon_lr, cooldown = 3e-3, 2e-2, 0.4


args = Hyperparameters()
torch.manual_seed(42)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x, bias):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = norm(q) @ norm(k).transpose(-2, -1) * 0.5 + bias
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.fc, self.out = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x, bias):
        x = x + self.gain[0] * self.attn(norm(x), bias)
        return x + self.gain[1] * self.out(F.relu(self.fc(norm(x))).square())


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(args.vocab, args.dim)
        self.position = nn.Parameter(0.02 * torch.randn(args.length, args.dim))
        self.blocks = nn.ModuleList([Block(args.dim, args.heads) for _ in range(args.depth)])
        self.head = nn.Linear(args.dim, args.vocab, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(p, std=0.5 / p.size(-1) ** 0.5 if "blocks" in name else 0.02)
        mask = torch.full((args.length, args.length), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, inputs, targets):
        T = inputs.size(1)
        x = norm(self.embed(inputs) + self.position[:T])
        for block in self.blocks:
            x = block(x, self.mask[:T, :T])
        logits = self.head(norm(x))
        logits = 15 * torch.tanh(logits.float() / 15)
        return F.cross_entropy(logits.view(-1, args.vocab), targets.view(-1))


def stream():
    g = torch.Generator().manual_seed(9)
    tokens = torch.randint(1, 5, (args.batch * args.length * args.accumulate * (args.steps + 2),), generator=g)
    tokens, size, i = tokens.cumsum(0) % args.vocab, args.batch * args.length, 0
    while True:
        chunk = tokens[i : i + size + 1]
        yield chunk[:-1].view(args.batch, -1), chunk[1:].view(args.batch, -1)
        i += size


model = GPT()
hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks")]
others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("blocks"))]
adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
muon = torch.optim.Muon(hidden, lr=args.muon_lr, momentum=0.95, weight_decay=0.0)
optimizers = [adam, muon]
for opt in optimizers:
    for group in opt.param_groups:
        group["initial_lr"] = group["lr"]


def scale(step):
    progress = step / args.steps
    return 1.0 if progress < 1 - args.cooldown else (1 - progress) / args.cooldown * 0.9 + 0.1


batches = stream()
for step in range(args.steps):
    loss_sum = 0.0
    for _ in range(args.accumulate):
        inputs, targets = next(batches)
        loss = model(inputs, targets) / args.accumulate
        loss.backward()
        loss_sum += loss.detach()
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * scale(step)
        opt.step()
    model.zero_grad(set_to_none=True)
    print(f"step:{step} train_loss:{loss_sum:.4f}")
