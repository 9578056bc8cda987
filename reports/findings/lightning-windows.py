"""Lightning: the loss that is logged is that of the last microbatch, and the gradient of a short window is too small.

Trains on five microbatches, accumulating two each, so that the last update of the epoch has one. The loss of a
microbatch is its number times the weight; so each gradient is the mean of the numbers of its microbatches.
"""

import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, number, index):
        numbers.append(number.item())
        loss = self.weight * number.squeeze()
        self.log("train_loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        mean = sum(numbers) / len(numbers)
        print(f"update of microbatches {numbers}: mean {mean}, gradient {self.weight.grad.item()}")
        numbers.clear()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


numbers = []
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
quiet = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False}
with TemporaryDirectory() as folder:
    logger = CSVLogger(folder)
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "log_every_n_steps": 1, "enable_model_summary": False}
    lightning.Trainer(**quiet, **options, logger=logger).fit(Module(), DataLoader([10.0, 2.0, 20.0, 4.0, 30.0]))
    print("logged:", *(Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
