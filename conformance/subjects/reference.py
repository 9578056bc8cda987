"""Adapter of the reference trainer in this repository. It uses the public protocol and nothing else."""

import importlib
from typing import Any

import torch
from torch import nn

import reference
from conformance.probes import DECAYED
from conformance.recipe import Recipe
from conformance.subject import Constant, Distribution, Normal
from conformance.trace import Checkpoint, TensorInfo


class ReferencePolicy:
    """The table of reference/initialize.py and the rule of reference/optimizer.py, written down a second time."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if tensor.name.endswith(".bias"):
            return Constant(0.0)
        if "norm" in tensor.name:
            return Constant(1.0)
        residual = tensor.name.endswith((".attention.proj.weight", ".mlp.proj.weight"))
        return Normal(0.0, 0.02 / (2 * recipe.n_layer) ** 0.5 if residual else 0.02)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        if recipe.decay == "ndim":
            return len(tensor.shape) >= 2
        if recipe.module is not None:
            return tensor.name in DECAYED
        parts = ("qkv", "proj", "fc", "gate", "head")
        return tensor.name.endswith(tuple(f"{part}.weight" for part in parts))

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
        return build(
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            n_embd=recipe.n_embd,
            vocab_size=recipe.vocab_size,
            block_size=recipe.block_size,
            tie_embeddings=recipe.tied,
        )

    def train_config(self, recipe: Recipe) -> reference.TrainConfig:
        """The run of the recipe; tests override it too."""
        optimizer: dict[str, Any] = recipe.optimizer.config()
        return reference.TrainConfig(
            updates=recipe.updates,
            microbatches=recipe.microbatches,
            optimizer=optimizer["class_path"],
            optimizer_args=optimizer["init_args"],
            decay="ndim" if recipe.decay == "ndim" else "role",
            warmup=recipe.warmup,
            min_lr=recipe.minimum_lr,
            clip=recipe.clip,
            precision=recipe.precision,
            logits=recipe.logits,
            stable_embedding=recipe.stable_embedding,
            initialization=recipe.initialization,
            compile=recipe.compile,
            seed=recipe.seed,
            accelerator="cuda" if recipe.precision == "16-mixed" else "cpu",
            devices=recipe.world_size,
            strategy="ddp" if recipe.world_size > 1 else "auto",
            evaluate_every=recipe.updates if recipe.evaluate else None,
            save_every=recipe.save_every,
        )

    def train(self, recipe: Recipe) -> None:
        model: Any = self.model_config(recipe)
        if recipe.module is not None:
            module, _, attribute = recipe.module.partition(":")
            model = getattr(importlib.import_module(module), attribute)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        trainer = reference.Trainer(model, self.train_config(recipe), recipe.directory)
        resume = recipe.resume.find("model.safetensors").parent if recipe.resume else False
        trainer.fit(recipe.batches(rank), recipe.validation_batches(), resume=resume)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        return reference.load_for_inference(checkpoint.find("model.safetensors").parent)
