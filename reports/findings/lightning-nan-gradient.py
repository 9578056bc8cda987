"""Lightning: one NaN in one gradient, and all weights are NaN; the Trainer goes on and saves them.

Puts a NaN into one element of one gradient in update 3 of 5, as an overflow would. Clipping is on.
"""

import logging
import tempfile
import warnings

import lightning
import torch
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))

    def training_step(self, batch, index):
        return self.model(batch).square().mean()

    def on_after_backward(self):
        if self.global_step == 2:
            self.model[0].weight.grad[0, 0] = torch.nan

    def on_train_batch_end(self, outputs, batch, index):
        finite = [bool(p.isfinite().all()) for p in self.parameters()]
        told = f"tensors that are finite: {sum(finite)} of {len(finite)}"
        print(f"update {index + 1}: loss {outputs['loss']:.4f}, {told}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.manual_seed(1)
with tempfile.TemporaryDirectory() as folder:
    options = {"max_steps": 5, "gradient_clip_val": 1.0, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", logger=False, default_root_dir=folder, **options)
    trainer.fit(Module(), DataLoader(torch.randn(10, 4), 2))
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"].values()
print(f"checkpoint: {sum(not tensor.isfinite().all() for tensor in saved)} of {len(saved)} tensors are not finite")
