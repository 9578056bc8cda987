"""Lightning's Trainer with a LightningModule."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


class Rows:
    """A loader that says how far it is, which Lightning keeps in its checkpoints."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows, self.done = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        for row in self.rows[self.done :]:
            self.done += 1
            yield row
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Module(lightning.LightningModule):
    def __init__(self, config: Config, fault: str) -> None:
        super().__init__()
        self.config, self.fault, self.model = config, fault, gpt.GPT(**config.shape)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = cross_entropy(self.model(batch[:, :-1]), batch[:, 1:])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", cross_entropy(self.model(batch[:, :-1]), batch[:, 1:]), prog_bar=True)

    def configure_optimizers(self) -> Any:
        config, peak = self.config, self.config.arguments["lr"]
        optimizer = config.optimizer(gpt.groups(self.model), **config.arguments)
        scheduler = LambdaLR(optimizer, lambda update: config.rate(update) / peak if peak else 1.0)
        interval = "epoch" if self.fault == "the schedule goes by epochs" else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def train(config: Config, resume: str | None, fault: str) -> None:
    lightning.seed_everything(config.seed, verbose=False)
    every = config.evaluate_every
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(config.folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=config.folder,
        precision="bf16-mixed" if config.bf16 else "32-true",
        max_steps=config.updates,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        gradient_clip_algorithm="value" if fault == "values are clipped" else "norm",
        limit_val_batches=1.0 if config.evaluate or every else 0,
        num_sanity_val_steps=0,
        val_check_interval=every * config.accumulate if every else len(config.batches),
        callbacks=[
            ModelCheckpoint(config.folder, save_top_k=-1, every_n_train_steps=config.save_every or config.updates)
        ],
    )
    validation: DataLoader[Tensor] = DataLoader(config.validation, batch_size=None)  # type: ignore[arg-type] # a list will do
    trainer.fit(Module(config, fault), Rows(config.batches), validation, ckpt_path=resume, weights_only=False)
    trainer.save_checkpoint(config.folder / "last.ckpt")


class Lightning:
    name, version, policy = "Lightning", lightning.__version__, gpt.Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "clip", "schedule", "dropout", "evaluate", "resume", "bf16-mixed")
    lacks = everything_but(*claimed, reason="not mapped")
    lacks |= {"float32-logits": "autocast computes the loss in float32 from logits in bfloat16"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        resume = None if recipe.resume is None else str(recipe.resume.find("*.ckpt"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about workers of loaders and the like
            train(Config.of(recipe), resume, self.fault)
