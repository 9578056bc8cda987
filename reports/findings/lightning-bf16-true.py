"""Lightning: with precision="bf16-true", small updates are lost in rounding, and nothing says so."""

import contextlib
import io
import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 32))

    def training_step(self, batch, index):
        return (self.model(batch.to(self.model[1].weight.dtype)).float() - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.0)


def moved(precision):
    lightning.seed_everything(1)
    module = Module()
    start = [p.detach().bfloat16().double() for p in module.parameters()]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", precision=precision, max_steps=20, **quiet)
    trainer.fit(module, DataLoader(torch.randn(40, 32), 2))
    return [(p.detach().double() - old).abs().sum() for p, old in zip(module.parameters(), start, strict=True)]


said = io.StringIO()
logging.captureWarnings(True)
for logger in ("lightning.pytorch", "lightning.fabric", "py.warnings"):
    logging.getLogger(logger).addHandler(logging.StreamHandler(said))
    logging.getLogger(logger).propagate = False
warnings.simplefilter("always")
for lr in (1e-3, 1e-4, 1e-5):
    with contextlib.redirect_stderr(said):
        exact, coarse = moved("32-true"), moved("bf16-true")
    ratios = [f"{sum(coarse) / sum(exact):.1%}", f"{coarse[0] / exact[0]:.1%}"]
    print(f"lr {lr:.0e}: moved under bf16-true, of what 32-true moved: all weights {ratios[0]}, the norm's {ratios[1]}")
words = ("bf16", "bfloat16", "round", "precision")
lines = said.getvalue().splitlines()
print(f"of {len(lines)} lines said, with one of {words}: {[x for x in lines if any(word in x for word in words)]}")
