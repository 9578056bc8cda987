"""Fine-tune a small GPT with Lightning's Trainer on prompts and answers of several lengths; prompts are masked."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

VOCAB, LENGTH, WIDTH = 83, 24, 32


def rows(count, seed):
    g = torch.Generator().manual_seed(seed)
    ids = (torch.randint(1, 6, (count, LENGTH), generator=g).cumsum(1) + torch.randint(VOCAB, (count, 1), generator=g)) % VOCAB
    prompt = torch.randint(2, LENGTH - 2, (count, 1), generator=g)
    labels = ids.masked_fill(torch.arange(LENGTH) < prompt, -100)
    return list(zip(ids, labels))


class Chat(L.LightningModule):
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

    def training_step(self, batch, index):
        ids, labels = batch
        loss = F.cross_entropy(self(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


L.seed_everything(7, verbose=False)
trainer = L.Trainer(
    accelerator="cpu", max_steps=8, accumulate_grad_batches=4, gradient_clip_val=1.0, log_every_n_steps=1,
    enable_checkpointing=False, enable_model_summary=False,
)
trainer.fit(Chat(), DataLoader(rows(96, 1), batch_size=2, shuffle=True))
