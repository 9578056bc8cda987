"""What the stacks share, so that each file shows what is its own: a tiny GPT, its settings, its policy."""

import math
import pydoc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance import Constant, Normal, Recipe, TensorInfo
from conformance.subject import Distribution

STD = 0.02


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(-2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, heads: int, dropout: float, tied: bool
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self.initialise)
        if tied:
            self.head.weight = self.tokens.weight

    def initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def mask(self, ids: Tensor) -> Tensor:  # (B, T) -> broadcast to (B, heads, T, T): True where a token may look
        return torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.drop(self.tokens(ids) + self.positions(torch.arange(ids.size(1))))
        for block in self.blocks:
            x = block(x, self.mask(ids))
        return self.head(self.norm(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    tensors = list(model.parameters())
    vectors = {"params": [p for p in tensors if p.ndim < 2], "weight_decay": 0.0}
    return [{"params": [p for p in tensors if p.ndim >= 2]}, vectors]


@dataclass(frozen=True)
class Config:
    """What a run is told. ``batches`` are rows of one token more than the context."""

    shape: dict[str, Any]
    batches: list[Tensor]
    labels: list[Tensor]
    validation: list[Tensor]
    folder: Path
    seed: int
    optimizer: Callable[..., torch.optim.Optimizer]
    arguments: dict[str, Any]
    updates: int
    accumulate: int
    warmup: int
    minimum_lr: float | None
    clip: float | None
    evaluate: bool
    evaluate_every: int | None
    save_every: int | None
    bf16: bool

    @classmethod
    def of(cls, recipe: Recipe) -> "Config":
        shape: dict[str, Any] = {"vocabulary": recipe.vocab_size, "context": recipe.block_size, "width": recipe.n_embd}
        shape |= {"layers": recipe.n_layer, "heads": recipe.n_head, "dropout": recipe.dropout, "tied": recipe.tied}
        optimizer = recipe.optimizer.config()
        return cls(
            shape=shape,
            batches=recipe.batches(),
            labels=recipe.labels(),
            validation=recipe.validation_batches(),
            folder=recipe.directory,
            seed=recipe.seed,
            optimizer=pydoc.locate(optimizer["class_path"]),  # type: ignore[arg-type] # a class, says the suite
            arguments=optimizer["init_args"],
            updates=recipe.updates,
            accumulate=recipe.microbatches,
            warmup=recipe.warmup,
            minimum_lr=recipe.minimum_lr,
            clip=recipe.clip,
            evaluate=recipe.evaluate,
            evaluate_every=recipe.evaluate_every,
            save_every=recipe.save_every,
            bf16=recipe.precision == "bf16-mixed",
        )

    def rate(self, update: int) -> float:
        return rate(update, self.arguments["lr"], self.warmup, self.updates, self.minimum_lr)

    def evaluates(self, update: int) -> bool:
        """After this update, counted from 1?"""
        every = self.evaluate_every
        return (every is not None and update % every == 0) or (
            update == self.updates and (self.evaluate or every is not None)
        )

    def saves(self, update: int) -> bool:
        """After this update, counted from 1?"""
        return update == self.updates or (self.save_every is not None and update % self.save_every == 0)


def rate(update: int, peak: float, warmup: int, updates: int, minimum: float | None) -> float:
    """Of an update counted from 0: up in a line, and down by a cosine that ends at the last update."""
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    if minimum is None:
        return peak
    progress = (update - warmup) / max(1, updates - 1 - warmup)
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, rows: list[Tensor]) -> float:
    model.eval()
    losses = [cross_entropy(model(r[:, :-1]), r[:, 1:]).item() for r in rows]
    model.train()
    return sum(losses) / len(losses)


class Policy:
    """What all of them declare, unless they say otherwise."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if len(tensor.shape) < 2:
            return Constant(1.0 if tensor.owner == "LayerNorm" and tensor.name.endswith("weight") else 0.0)
        return Normal(0.0, STD)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return len(tensor.shape) >= 2

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        return rate(update, recipe.optimizer.rate, recipe.warmup, recipe.updates, recipe.minimum_lr)
