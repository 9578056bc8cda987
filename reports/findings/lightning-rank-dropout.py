"""Lightning: after seed_everything, all ranks draw the same dropout masks."""

import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.drop = torch.nn.Parameter(torch.ones(8)), torch.nn.Dropout(0.5)

    def training_step(self, batch, index):
        kept = self.drop(self.weight)
        print(f"rank {self.global_rank}, update {index + 1}: {''.join('.x'[bool(value)] for value in kept)}\n", end="")
        return kept.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
lightning.seed_everything(1, workers=True, verbose=False)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=2, **quiet)
trainer.fit(Module(), DataLoader(range(8)))
