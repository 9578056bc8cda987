"""Lightning: state that a resume loses: all of GrokAdamW's, and digits of NAdam's under bf16-true."""

import contextlib
import io
import logging
import tempfile
import warnings

import lightning
import torch
from grokadamw import GrokAdamW
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.model = kind, torch.nn.Linear(32, 1)

    def training_step(self, batch, index):
        return self.model(batch.to(self.model.weight.dtype)).square().mean()

    def on_train_end(self):
        states = self.optimizers().optimizer.state.values()
        self.kept = ["mu_product {mu_product:.8f}".format(**state) for state in states if "mu_product" in state][:1]

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=1e-2)


def run(kind, precision, updates, resume, folder):
    lightning.seed_everything(1, verbose=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_steps=updates, precision=precision, **options)
    trainer.fit(module := Module(kind), DataLoader(torch.ones(4, 32)), ckpt_path=resume)
    trainer.save_checkpoint(f"{folder}/{updates}.ckpt")
    return " ".join([f"sum of weights {module.model.weight.sum().item():.7f}", *module.kept])


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
for kind, precision in ((torch.optim.AdamW, "32-true"), (GrokAdamW, "32-true"), (torch.optim.NAdam, "bf16-true")):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        whole = run(kind, precision, 8, None, folder)
        run(kind, precision, 4, None, folder)
        resumed = run(kind, precision, 8, f"{folder}/4.ckpt", folder)
        print(f"{kind.__name__:9} {precision:9} not interrupted: {whole}; resumed: {resumed}")
