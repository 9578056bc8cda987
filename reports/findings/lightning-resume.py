"""Lightning: what a resume changes: the dropout, and the order of samples.

Trains on eight samples in batches of two, with a loader and a sampler that keep their state (torchdata's), and prints
the samples of each update and the sum of the weights at the end.
"""

import contextlib
import io
import logging
import tempfile
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler


class Module(lightning.LightningModule):
    def __init__(self, dropout):
        super().__init__()
        self.layer, self.drop, self.seen = torch.nn.Linear(8, 1), torch.nn.Dropout(dropout), []

    def training_step(self, samples, index):
        self.seen.append(samples.tolist())
        return self.layer(self.drop(torch.nn.functional.one_hot(samples, 8).float())).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(updates, dropout, shuffle, folder, resume=None):
    lightning.seed_everything(1, verbose=False)
    data = range(8)
    loader = StatefulDataLoader(data, 2, sampler=StatefulDistributedSampler(data, 1, 0, shuffle=shuffle, seed=1))
    save = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    options = {"max_steps": updates, "logger": False, "callbacks": [save]}
    trainer = lightning.Trainer(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options)
    module = Module(dropout)
    trainer.fit(module, loader, ckpt_path=resume)
    trainer.save_checkpoint(f"{folder}/after-fit.ckpt")
    return f"{sum(p.sum().item() for p in module.parameters()):.4f}, samples {module.seen}"


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
for dropout, shuffle in ((0.0, False), (0.5, False), (0.0, True)):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        print(f"dropout {dropout}, shuffled {shuffle}")
        print(f"  not interrupted:                {run(7, dropout, shuffle, folder)}")
        for update in (3, 4, 5):
            found = run(7, dropout, shuffle, f"{folder}/later", f"{folder}/step={update}.ckpt")
            print(f"  resumed after update {update}:         {found}")
        run(3, dropout, shuffle, f"{folder}/short")
        found = run(7, dropout, shuffle, f"{folder}/later", f"{folder}/short/after-fit.ckpt")
        print(f"  resumed after a run of 3 ended: {found}")
