"""Train a small GPT with DeepSpeed's engine and ZeRO-1 on a CPU."""

import os

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29643"}

import deepspeed
import torch
from torch import nn
from torch.nn import functional as F

VOCAB, LENGTH, WIDTH = 71, 24, 32


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1))
        x = self.tokens(ids) + self.positions(torch.arange(ids.size(1)))
        return self.head(self.blocks(x, mask, is_causal=True))


def batch():
    rows = torch.randint(1, 6, (4, LENGTH + 1)).cumsum(1)
    return (rows + torch.randint(VOCAB, (4, 1))) % VOCAB


torch.manual_seed(3)
model = GPT()
matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == large] for large in (True, False))
optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}
deepspeed.init_distributed("gloo")
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
total = 0.0
for _ in range(16):
    rows = batch()
    loss = F.cross_entropy(engine(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    engine.backward(loss)
    total += loss.item() / 2
    last = engine.is_gradient_accumulation_boundary()
    engine.step()
    if last:
        print(f"step {engine.global_steps}: loss {total:.5f}, grad_norm {engine.get_global_grad_norm():.4f}")
        total = 0.0
