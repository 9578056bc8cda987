"""Lightning: a module whose training_step logs cannot be trained with torch.compile and PyTorch 2.13.

Compiles with the backend "eager", so that only the tracing of Python counts. Without self.log the same run trains.
"""

import logging
import warnings

import lightning
import torch
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    def __init__(self, logs):
        super().__init__()
        self.model, self.logs = torch.nn.Linear(4, 1), logs

    def training_step(self, batch, index):
        loss = self.model(batch).square().mean()
        if self.logs:
            self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
options = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
options |= {"enable_progress_bar": False, "enable_model_summary": False}
for logs in (False, True):
    trainer = lightning.Trainer(**options)
    try:
        trainer.fit(torch.compile(Module(logs), backend="eager"), DataLoader(torch.randn(8, 4), 2))
    except Exception as error:
        print(f"self.log {logs}: {type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        print(f"self.log {logs}: {trainer.global_step} updates")
