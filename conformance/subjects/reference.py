"""Adapter of the reference trainer in this repository. It uses the public protocol and nothing else."""

import pydoc
from typing import Any

import torch
from torch import nn

import reference
from conformance import Checkpoint, Constant, Normal, Recipe, TensorInfo
from conformance.probes import DECAYED
from conformance.subject import Distribution


class ReferencePolicy:
    """The table of reference/initialize.py and the rule of reference/optimizer.py, written down a second time."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if tensor.name.endswith(".bias"):
            return Constant(0.0)
        if "norm" in tensor.name:
            return Constant(1.0)
        return Normal(0.0, 0.02 / (2 * recipe.n_layer) ** 0.5 if ".proj." in tensor.name else 0.02)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        if recipe.decay == "ndim":
            return len(tensor.shape) >= 2
        if recipe.module is not None:
            return tensor.name in DECAYED
        return tensor.name.endswith(("qkv.weight", "proj.weight", "fc.weight", "gate.weight", "head.weight"))

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        peak: float = dict(recipe.optimizer.arguments).get("lr", 1e-3)
        return peak * min(1.0, (update + 1) / (recipe.warmup + 1))


class Reference:
    """reference.Trainer."""

    name = "reference"
    version = "0.1.0"
    policy = ReferencePolicy()
    lacks: dict[str, str] = {}
    if not torch.cuda.is_available():
        lacks["16-mixed"] = "reference.trainer.launch refuses it on the CPU, and this machine has no GPU"

    def model_config(self, recipe: Recipe) -> reference.GPTConfig:
        """The model of the recipe; tests override it to vary what must not matter."""
        build = reference.GPTConfig.gpt2 if recipe.shape == "gpt" else reference.GPTConfig.llama
        size = {name: getattr(recipe, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")}
        return build(**size, tie_embeddings=recipe.tied)

    def train_config(self, recipe: Recipe) -> reference.TrainConfig:
        """The run of the recipe; tests override it too."""
        same = "updates microbatches warmup clip precision logits stable_embedding initialization compile seed"
        optimizer: dict[str, Any] = recipe.optimizer.config()
        return reference.TrainConfig(
            **{name: getattr(recipe, name) for name in same.split()},
            optimizer=optimizer["class_path"],
            optimizer_args=optimizer["init_args"],
            decay="ndim" if recipe.decay == "ndim" else "role",
            schedule="constant" if recipe.minimum_lr is None else "cosine",
            min_lr=recipe.minimum_lr,
            save_every=recipe.save_every,
            accelerator="cuda" if recipe.precision == "16-mixed" else "cpu",
            devices=recipe.world_size,
            strategy="ddp" if recipe.world_size > 1 else "auto",
            evaluate_every=recipe.updates if recipe.evaluate else None,
        )

    def train(self, recipe: Recipe) -> None:
        model: Any = self.model_config(recipe)
        if recipe.module is not None:
            model = pydoc.locate(recipe.module.replace(":", "."))
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        trainer = reference.Trainer(model, self.train_config(recipe), recipe.directory)
        resume = recipe.resume.find("model.safetensors").parent if recipe.resume else False
        trainer.fit(recipe.batches(rank), recipe.validation_batches(), resume=resume)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        return reference.load_for_inference(checkpoint.find("model.safetensors").parent)
