"""Adapter of the reference trainer in this repository. It uses the public protocol and nothing else."""

import importlib.util
import json
import math
import os
import pydoc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning  # noqa: F401 # what the trainer runs on: if it is missing, loading the subject says so
import torch
from torch import Tensor, nn

import reference
from conformance import Checkpoint, Constant, Normal, Recipe, TensorInfo
from conformance.subject import Distribution, Leftovers, Place, Setting, Winner
from conformance.version import suite_version
from reference.data import TokenData
from reference.data.prepare import prepare
from reference.data.tokenfile import TokenWriter
from reference.finetuning import FinetuneConfig


class ReferencePolicy:
    """The table of reference/initialize.py and the rule of reference/optimizer.py, written down a second time."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if tensor.name.endswith(".bias"):
            return Constant(0.0)
        if "norm" in tensor.name:
            return Constant(1.0)
        std = 0.02 if recipe.initial_std is None else recipe.initial_std
        return Normal(0.0, std / (2 * recipe.n_layer) ** 0.5 if ".proj." in tensor.name else std)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        if recipe.decay != "declared":
            return len(tensor.shape) >= 2 or recipe.decay == "all"
        if recipe.module is not None:
            return tensor.owner == "Linear" and tensor.name.endswith(".weight")
        return tensor.name.endswith(("qkv.weight", "proj.weight", "fc.weight", "gate.weight", "head.weight"))

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        peak: float = dict(recipe.optimizer.arguments).get("lr", 1e-3)
        if update < recipe.warmup or recipe.minimum_lr is None:
            return peak * min(1.0, (update + 1) / (recipe.warmup + 1))
        if recipe.cooldown is not None:
            passed = max(0, update - (recipe.updates - 1 - recipe.cooldown)) / recipe.cooldown
            return recipe.minimum_lr + (peak - recipe.minimum_lr) * (1 - passed**0.5)
        span = recipe.updates - 1 - recipe.warmup
        progress = (update - recipe.warmup) / span if span > 0 else 1.0
        return recipe.minimum_lr + (peak - recipe.minimum_lr) * (1 + math.cos(math.pi * progress)) / 2

    def rate(self, recipe: Recipe, update: int, tensor: TensorInfo) -> float:
        if recipe.rest is None or self.owner(recipe, tensor) == recipe.optimizer.class_path:
            return self.learning_rate(recipe, update)
        return self.learning_rate(replace(recipe, optimizer=recipe.rest), update)

    def owner(self, recipe: Recipe, tensor: TensorInfo) -> str | None:
        if recipe.optimizer.class_path != "torch.optim.Muon" and recipe.rest is None:
            return None
        inside = tensor.name.startswith(("blocks.", "attn_layers."))  # of our GPT, and of x-transformers
        matrix = inside and len(tensor.shape) == 2
        return "torch.optim.Muon" if matrix else recipe.rest.class_path if recipe.rest else "torch.optim.AdamW"

    def leftovers(self, recipe: Recipe, place: Place) -> Leftovers | None:
        words: dict[Place, Leftovers] = {"microbatch": "weighed", "validation": "weighed", "tail": "short"}
        return words.get(place, "carried")

    def wins_on_resume(self, recipe: Recipe, setting: Setting) -> Winner:
        return "recipe"

    def logits(self, recipe: Recipe, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
        return self.logits_with_dropout(recipe, weights, ids, lambda x: x)

    def logits_with_dropout(
        self, recipe: Recipe, weights: Mapping[str, Tensor], ids: Tensor, drop: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        own = "blocks.0.norm_attention.weight" in weights  # and not a module of somebody else's
        return declared_forward(recipe, weights, ids, drop) if own else None


def declared_forward(
    recipe: Recipe, weights: Mapping[str, Tensor], ids: Tensor, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the logits of GPT-2 (Radford et al. 2019) or Llama (https://arxiv.org/abs/2302.13971), written plainly."""
    gpt, heads, size = recipe.shape == "gpt", recipe.n_head, recipe.n_embd // recipe.n_head
    eps = 1e-5 if recipe.norm_eps is None else recipe.norm_eps
    base = 10_000.0 if recipe.rotary_base is None else recipe.rotary_base
    shared = heads // (recipe.n_kv_head or heads)  # query heads in a row that have the same keys and values

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if gpt and name != "head" else 0.0)

    def norm(name: str, x: Tensor) -> Tensor:
        if gpt:
            x = x - x.mean(-1, keepdim=True)
        scaled = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
        return scaled + weights[f"{name}.bias"] if gpt else scaled

    places = torch.arange(ids.shape[1], dtype=torch.float64)
    phase = torch.outer(places, base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)).repeat(1, 2)

    def turned(x: Tensor) -> Tensor:  # (B, H, T, D), the halves convention
        first, second = x.chunk(2, dim=-1)
        return x if gpt else x * phase.cos() + torch.cat((-second, first), dim=-1) * phase.sin()

    x = weights["embedding.weight"][ids]
    if gpt:
        x = x + weights["position.weight"][: ids.shape[1]]
    x = drop(x)
    for layer in range(recipe.n_layer):
        block = f"blocks.{layer}"
        qkv = linear(f"{block}.attention.qkv", norm(f"{block}.norm_attention", x)).unflatten(-1, (-1, size))
        q, k, v = qkv.transpose(1, 2).split((heads, heads // shared, heads // shared), dim=1)
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))  # (B, H, T, D), as q is
        scores = turned(q) @ turned(k).transpose(-1, -2) / size**0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        mixed = drop(scores.masked_fill(later, -math.inf).softmax(-1)) @ v
        x = x + drop(linear(f"{block}.attention.proj", mixed.transpose(1, 2).flatten(-2)))
        h = norm(f"{block}.norm_mlp", x)
        up = linear(f"{block}.mlp.fc", h)
        if gpt:
            hidden = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            gate = linear(f"{block}.mlp.gate", h)
            hidden = gate * torch.sigmoid(gate) * up
        x = x + drop(linear(f"{block}.mlp.proj", hidden))
    return linear("head", norm("norm", x))


def token_data(recipe: Recipe, split: str, document: Tensor, rank: int, targets: Tensor | None = None) -> TokenData:
    """Write a document, and the id that ends it, into a token file of this rank's own; return it open.

    Args:
        targets: for each token of the document whether it is one, bool; None: all are.
    """
    folder = recipe.directory / f"tokens-{rank}"
    kind: Any = {"vocab_size": recipe.vocab_size, "tokenizer": "none", "end_of_document": recipe.vocab_size - 1}
    with TokenWriter(folder, split, masked=targets is not None, **kind) as writer:
        writer.write(document.numpy(), None if targets is None else targets.numpy())
        writer.end_document()
        writer.publish()
    sizes = {"block_size": recipe.block_size, "microbatch_size": recipe.microbatch_size}
    return TokenData(folder, split, **sizes, seed=recipe.seed)


def chat_data(recipe: Recipe, rank: int) -> TokenData:
    """Prepare chats as ``python -m reference prepare --field`` does, and return them open."""
    folder = recipe.directory / f"chats-{rank}"
    tokenizer, records = recipe.write_tokenizer(folder), folder / "chats.jsonl"
    lines = [json.dumps({"messages": messages}) for messages in recipe.conversations()]
    records.write_text("\n".join(lines), encoding="utf-8")
    prepare([str(records)], str(tokenizer), folder / "data", field="messages", progress=False)
    sizes = {"block_size": recipe.block_size, "microbatch_size": recipe.microbatch_size}
    return TokenData(folder / "data", "train", **sizes, seed=recipe.seed)


def pairs(batches: list[Tensor], labels: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return ids and targets of microbatches, (B, T) each."""
    return [(rows[:, :-1], targets[:, 1:]) for rows, targets in zip(batches, labels, strict=True)]


class Reference:
    """reference.Trainer."""

    name = "reference"
    version = suite_version()
    policy = ReferencePolicy()
    lacks: dict[str, str] = {"batch-total": "TrainConfig.microbatches counts the microbatches"}
    if not torch.cuda.is_available():
        lacks["16-mixed"] = "reference.training.launch refuses it on the CPU, and this machine has no GPU"
    if importlib.util.find_spec("peft") is None:
        lacks["finetune"] = lacks["quantised"] = "peft is not installed: pip install 'gpt-conformance[finetune]'"

    def model_config(self, recipe: Recipe) -> reference.GPTConfig:
        """Return the model of the recipe; tests override it to vary what must not matter."""
        build = reference.GPTConfig.gpt2 if recipe.shape == "gpt" else reference.GPTConfig.llama
        size: dict[str, Any] = {
            name: getattr(recipe, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
        }
        size |= {"n_kv_head": recipe.n_kv_head, "fp32_residual": recipe.residual == "float32"}
        given = {"init_std": recipe.initial_std, "rope_theta": recipe.rotary_base, "norm_eps": recipe.norm_eps}
        size |= {name: value for name, value in given.items() if value is not None}
        return build(**size, tie_embeddings=recipe.tied, dropout=recipe.dropout)

    def train_config(self, recipe: Recipe) -> reference.TrainConfig:
        """Return the run of the recipe; tests override it too."""
        same = "updates microbatches warmup clip precision logits stable_embedding initialization compile seed"
        same += " activation_checkpointing cooldown keep_last evaluate_batches"
        optimizer: dict[str, Any] = recipe.optimizer.config()
        rest: dict[str, Any] = {} if recipe.rest is None else recipe.rest.config()
        schedule: Any = "constant" if recipe.minimum_lr is None else "cosine" if recipe.cooldown is None else "wsd"
        return reference.TrainConfig(
            **{name: getattr(recipe, name) for name in same.split()},
            optimizer=optimizer["class_path"],
            optimizer_args=optimizer["init_args"],
            optimizer_rest=rest.get("class_path"),
            optimizer_rest_args=rest.get("init_args", {}),
            decay="role" if recipe.decay == "declared" else recipe.decay,
            schedule=schedule,
            min_lr=recipe.minimum_lr,
            save_every=recipe.save_every,
            accelerator="cuda" if recipe.precision == "16-mixed" else "cpu",
            devices=recipe.world_size,
            strategy="fsdp" if recipe.sharded else "ddp" if recipe.world_size > 1 else "auto",
            evaluate_every=recipe.updates if recipe.evaluate else recipe.evaluate_every,
        )

    def train(self, recipe: Recipe) -> None:
        model: Any = self.model_config(recipe)
        if recipe.module is not None:
            model = pydoc.locate(recipe.module.replace(":", "."))
        rank = int(os.environ["RANK"]) if recipe.world_size > 1 else 0  # the process group is not there yet
        finetune = self.finetune_config(recipe) if recipe.finetune else None
        told = [partial(self.tell, recipe)]
        directory: Path = recipe.directory
        resume: Path | bool = False
        if recipe.resume is not None:
            folder = recipe.resume.find("model.safetensors").parent
            directory, resume = (folder.parent, True) if recipe.find_newest else (directory, folder)
        trainer = reference.Trainer(model, self.train_config(recipe), directory, told, finetune)
        base = recipe.finetune.find("model.safetensors").parent if recipe.finetune else None
        trainer.fit(self.data(recipe, rank), self.validation(recipe, rank), resume=resume, init_from=base)

    def tell(self, recipe: Recipe, record: Any) -> None:
        """Hand on what the loggers of python -m reference get."""
        metrics = {"loss": record.loss, "learning_rate": record.learning_rate, "grad_norm": record.gradient_norm}
        metrics |= {"target_tokens": record.tokens}
        more = {} if record.validation_loss is None else {"validation_loss": record.validation_loss}
        recipe.report(metrics | more, record.update)

    def finetune_config(self, recipe: Recipe) -> FinetuneConfig:
        """Return how to fine-tune; tests override it too."""
        more: dict[str, Any] = {"lora_dropout": recipe.lora_dropout, "embeddings": recipe.tuned_embedding}
        return FinetuneConfig(lora_rank=recipe.lora_rank, quantize=recipe.quantised or "none", **more)

    def data(self, recipe: Recipe, rank: int) -> Any:
        """Batches, pairs of ids and targets, or token files, from which the trainer draws by itself."""
        if recipe.shuffled_by == "loader":
            return recipe.loader()
        if recipe.chats:
            return chat_data(recipe, rank)
        if recipe.samples is not None:
            targets = (recipe.dataset_labels()[:, :-1] != -100).flatten() if recipe.masked_samples else None
            return token_data(recipe, "train", recipe.document(), rank, targets)
        return pairs(recipe.batches(rank), recipe.labels(rank)) if recipe.ignored_targets else recipe.batches(rank)

    def validation(self, recipe: Recipe, rank: int) -> Any:
        """Likewise, to evaluate."""
        if recipe.validation == "document":
            return token_data(recipe, "validation", recipe.validation_document(), rank)
        batches = recipe.validation_batches(rank)
        return pairs(batches, recipe.validation_labels(rank)) if recipe.ignored_validation else batches

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        return reference.load_for_inference(checkpoint.find("model.safetensors").parent)
