"""Fine-tune on padded conversations: prompts and padding are masked, the loss is the mean over an update's target tokens."""

import copy
import random

import torch
from torch import nn
from torch.nn import functional as F

IGNORE, PAD, EOS, VOCAB, WIDTH, LONGEST = -100, 0, 1, 64, 32, 28


class Block(nn.Module):
    def __init__(self, heads=2, dropout=0.05):
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout))

    def forward(self, x, mask):
        q, k, v = self.wqkv(self.norm_a(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        return x + self.ff(self.norm_b(x))


class ChatModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02) if p.ndim > 1 else None
        for m in self.modules():
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)
        self.lm_head.weight = self.tokens.weight

    def forward(self, input_ids, attention_mask):
        T = input_ids.size(1)
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        mask = causal & attention_mask[:, None, None, :].bool()
        x = self.tokens(input_ids) + self.positions(torch.arange(T))
        for block in self.blocks:
            x = block(x, mask)
        return self.lm_head(self.norm(x))


def examples(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        prompt = [draw.randrange(2, VOCAB) for _ in range(draw.randrange(2, 9))]
        answer = [2 + (prompt[0] + 3 * i) % (VOCAB - 2) for i in range(draw.randrange(1, 18))] + [EOS]
        yield {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def collate(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    ids = torch.tensor([r["input_ids"] + [PAD] * (longest - len(r["input_ids"])) for r in rows])
    labels = torch.tensor([r["labels"] + [IGNORE] * (longest - len(r["labels"])) for r in rows])
    return ids, labels, (ids != PAD).long()


def update(model, optimizer, micro_batches):
    """One optimizer step over several micro-batches, each token with the same weight."""
    optimizer.zero_grad()
    count = sum((labels[:, 1:] != IGNORE).sum() for _, labels, _ in micro_batches)
    total = 0.0
    for ids, labels, attention in micro_batches:
        logits = model(ids, attention)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum") / count
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def main():
    torch.manual_seed(13)
    data = list(examples(64, seed=5))
    model = ChatModel()
    start = copy.deepcopy(model.state_dict())
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    decay = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}], lr=1e-3)
    model.train()
    for step in range(7):
        rows = data[step * 9 : step * 9 + 9]
        micro_batches = [collate(rows[i : i + 3]) for i in range(0, 9, 3)]
        print(f"step {step + 1}: loss = {update(model, optimizer, micro_batches):.5f}")
    moved = sum((p - start[n]).abs().sum().item() for n, p in model.named_parameters())
    print(f"moved by {moved:.1f}")


if __name__ == "__main__":
    main()
