"""Lightning: the validation loss that two ranks log is the mean of their means, however many targets each one has.

The last sequence of eight has one target, the others sixteen. Prints what one process logs, and what two ranks log.
"""

import logging
import warnings

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([2.0] + [0.0] * 31))

    def validation_step(self, labels, index):
        loss = cross_entropy(self.logits.expand(labels.numel(), -1), labels.flatten())  # the mean over its targets
        self.log("val_loss", loss, batch_size=int((labels >= 0).sum()), sync_dist=True)


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
rows = [torch.full((16,), 0)] * 7 + [torch.cat((torch.tensor([1]), torch.full((15,), -100)))]
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
for case, options in (("one process", {}), ("two ranks", {"devices": 2, "strategy": "ddp_fork"})):

    class Data(lightning.LightningDataModule):
        def val_dataloader(self):
            sampler = DistributedSampler(rows, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
            return DataLoader(rows, 1, sampler=sampler)

    trainer = lightning.Trainer(**quiet, **options, use_distributed_sampler=False)
    trainer.validate(Module(), Data(), verbose=False)
    print(f"{case}: val_loss {trainer.callback_metrics['val_loss']:.4f}")
