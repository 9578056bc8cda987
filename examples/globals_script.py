"""A GPT trained by a script of globals, as many are: no function to call, all settings at the top.

python examples/globals_script.py
torchrun --nproc-per-node 2 examples/globals_script.py      # two processes on the CPU
"""

import argparse
import os
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

vocab_size, block_size, n_layer, n_head, n_embd = 256, 64, 2, 4, 64
batch_size, accumulation, max_iters, learning_rate = 8, 2, 100, 3e-3
weight_decay, grad_clip, log_every, save_every = 0.1, 1.0, 10, 50
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--resume", help="a checkpoint of this script")
args = parser.parse_args()
torch.manual_seed(args.seed)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.up, self.down = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (n_head, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.norm, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.frombuffer(bytearray().join(source.read_bytes() for source in sources), dtype=torch.uint8)


def get_batch(number):
    """Return ids and targets of microbatch `number` of this process."""
    draw = torch.Generator().manual_seed(number * world + rank)
    rows = text.unfold(0, block_size + 1, 1)[torch.randint(len(text) - block_size, (batch_size,), generator=draw)]
    return rows[:, :-1].long(), rows[:, 1:].long()


model = GPT()
matrices = [p for p in model.parameters() if p.ndim >= 2]
vectors = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
start = 0
if args.resume:
    saved = torch.load(args.resume, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["updates"]
if world > 1:
    torch.distributed.init_process_group("gloo")

for update in range(start, max_iters):
    total = 0.0
    for micro in range(accumulation):
        logits, loss = model(*get_batch(update * accumulation + micro))
        (loss / accumulation).backward()
        total += loss.item() / accumulation
    if world > 1:  # the mean gradient of all processes
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= world
    nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    done = update + 1
    if done % log_every == 0 and rank == 0:
        print(f"update {done}: loss {total:.4f}")
    if done % save_every == 0 and rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "updates": done}
        torch.save(state, "globals.pt")
if world > 1:
    torch.distributed.destroy_process_group()
