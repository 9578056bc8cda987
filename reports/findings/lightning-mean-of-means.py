"""Lightning: a token's weight depends on its microbatch and on its rank, because means of losses are averaged.

The last sequence of eight has one target, the others sixteen. Prints the gradient of one batch of eight, of four
microbatches of two, and of two ranks with four each.
"""

import logging
import warnings

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler


class Module(lightning.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.case, self.logits = case, torch.nn.Parameter(torch.zeros(32))

    def training_step(self, labels, index):
        return cross_entropy(self.logits.expand(labels.numel(), -1), labels.flatten())  # the mean over its targets

    def on_before_optimizer_step(self, optimizer):
        if self.global_rank == 0:
            print(f"{self.case:16} gradient {self.logits.grad[:4].tolist()}", flush=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
rows = [torch.full((16,), 0)] * 7 + [torch.cat((torch.tensor([1]), torch.full((15,), -100)))]
quiet = {"accelerator": "cpu", "max_steps": 1, "logger": False, "enable_checkpointing": False}
quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
for case, size, options in (
    ("one batch", 8, {}),
    ("4 microbatches", 2, {"accumulate_grad_batches": 4}),
    ("2 ranks", 4, {"devices": 2, "strategy": "ddp_fork"}),
):

    class Data(lightning.LightningDataModule):
        def train_dataloader(self, size=size):
            ranks = self.trainer.world_size
            sampler = DistributedSampler(rows, ranks, self.trainer.global_rank, shuffle=False)
            return DataLoader(rows, size, sampler=sampler)

    lightning.Trainer(**quiet, **options).fit(Module(case), Data())
