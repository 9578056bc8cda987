"""Adapter of Lightning's Trainer: Recipe -> lightning.Trainer.fit. Installed by the extra ``lightning-trainer``."""

import os
from operator import itemgetter
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from conformance import Checkpoint, Recipe
from conformance.subjects import user_code
from conformance.subjects.user_code import UserPolicy, cross_entropy, microbatches


class Module(lightning.LightningModule):
    """The user's code, as Lightning's documentation has it."""

    def __init__(self, shape: dict[str, Any], recipe: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters("shape")
        self.recipe, self.model = recipe, user_code.build_model(**shape)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.loss(*((batch, batch) if isinstance(batch, Tensor) else batch))
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", self.loss(*batch), batch_size=int((batch[1][:, 1:] != -100).sum()), sync_dist=True)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.model(ids[:, :-1]), labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(grad_norm(self, norm_type=2))

    def on_train_end(self) -> None:
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/end.ckpt")

    def configure_optimizers(self) -> Any:
        optimizer = user_code.build_optimizer(self.recipe, self.model)
        schedule = user_code.build_schedule(self.recipe, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(recipe: Recipe) -> Any:
    """Return the user's loader, shuffled samples, or microbatches in order, which the Trainer's own sampler for "
    "ranks would shuffle."""
    if recipe.shuffled_by == "loader":
        return recipe.loader()
    rank = int(os.environ["RANK"]) if recipe.world_size > 1 else 0
    if recipe.samples is None:
        batches: Any = microbatches(recipe)
        order = StatefulDistributedSampler(batches, recipe.world_size, rank, shuffle=False)
        return StatefulDataLoader(batches, sampler=order, collate_fn=itemgetter(0))
    data: Any = user_code.samples(recipe)
    order = StatefulDistributedSampler(data, recipe.world_size, rank, seed=recipe.seed)
    return StatefulDataLoader(data, recipe.microbatch_size, sampler=order)


class LightningTrainer:
    """lightning.Trainer.fit."""

    name, version, policy = "Lightning Trainer", lightning.__version__, UserPolicy()
    lacks = {
        "batch-total": "accumulate_grad_batches counts the microbatches",
        "activation-checkpointing": "on one device it is up to the user's module; only FSDPStrategy has an option",
        "16-mixed": "on the CPU the Trainer warns, and takes bf16-mixed",
        "meta-init": "on one device the Trainer materialises nothing; FSDPStrategy and ModelParallelStrategy do",
        "sharded": "this adapter trains replicas (DDP): with ModelParallelStrategy the user's configure_model shards",
    }
    lacks |= dict.fromkeys(("float32-logits", "logits-opt-out"), "the Trainer converts no output of a module")
    lacks |= dict.fromkeys(user_code.OPTIMIZER, "configure_optimizers is the user's")
    lacks |= dict.fromkeys(user_code.MODEL, "the model is the user's, and the Trainer swaps no module in it")
    lacks["final-evaluation"] = "the Trainer validates at val_check_interval, and not once more at the end"
    lacks |= {"finds-newest": "this adapter names the checkpoint", "chats": "the Trainer is given a loader"}
    lacks["validation-document"] = "the Trainer is given a loader; the user divides documents"

    def train(self, recipe: Recipe) -> None:
        lightning.seed_everything(recipe.seed, verbose=False)
        every = recipe.updates if recipe.evaluate else recipe.evaluate_every
        newest: Any = {"save_top_k": recipe.keep_last or -1, "monitor": "step" if recipe.keep_last else None}
        save = ModelCheckpoint(recipe.directory, mode="max", every_n_train_steps=recipe.save_every, **newest)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=recipe.world_size,
            precision=recipe.precision,
            max_steps=recipe.updates,
            accumulate_grad_batches=recipe.microbatches,
            gradient_clip_val=recipe.clip,
            limit_val_batches=(recipe.evaluate_batches or 1.0) if every else 0,
            check_val_every_n_epoch=None,
            val_check_interval=every and every * recipe.microbatches,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=CSVLogger(recipe.directory),
            callbacks=[LearningRateMonitor("step"), save],
            default_root_dir=recipe.directory,
        )
        module: Any = Module(user_code.shape_of(recipe), recipe)
        validation: Any = DataLoader(microbatches(recipe, "validation"), batch_size=None, generator=torch.Generator())
        resume = recipe.resume.find("*.ckpt") if recipe.resume else None
        if recipe.compile:
            module = torch.compile(module)
        trainer.fit(module, loader(recipe), validation, ckpt_path=resume)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        module: Any = Module.load_from_checkpoint(checkpoint.find("*.ckpt"))
        return module.model.eval()
