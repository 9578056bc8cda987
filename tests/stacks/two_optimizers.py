"""Muon on the matrices of the blocks, beside AdamW on the rest, as in modded-nanogpt."""

import math

import torch
from torch import nn

from conformance import Recipe, TensorInfo, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    decay = config.arguments.get("weight_decay", 0.1)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    tables = [model.tokens.weight, model.positions.weight, model.head.weight]
    if fault == "the head is in neither":
        tables = tables[:2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, weight_decay=decay)
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    data = iter(zip(config.batches, config.labels))
    for update in range(config.updates):
        rate = config.rate(update)
        for group in adamw.param_groups:
            group["lr"] = rate
        for group in muon.param_groups:
            group["lr"] = 2 * rate
        total = 0.0
        for _ in range(config.accumulate):
            batch, labels = next(data)
            loss = cross_entropy(model(batch[:, :-1]), labels[:, 1:]) / config.accumulate
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf, error_if_nonfinite=True)
        muon.step()
        adamw.step()
        if fault == "only AdamW's gradients are cleared":
            adamw.zero_grad()
        else:
            model.zero_grad()
        print(f"step {update + 1} | train loss {total:.6f} | lr {rate:.3e} | grad norm {norm:.4f}")
        if config.evaluates(update + 1):
            print(f"step {update + 1} | val loss {gpt.evaluate(model, config.validation):.6f}")


def in_block(tensor: TensorInfo) -> bool:
    return "blocks." in tensor.name and len(tensor.shape) == 2


class Policy(gpt.Policy):
    def owner(self, recipe: Recipe, tensor: TensorInfo) -> str:
        return "torch.optim.Muon" if in_block(tensor) else "torch.optim.AdamW"

    def rate(self, recipe: Recipe, update: int, tensor: TensorInfo) -> float:
        return self.learning_rate(recipe, update) * (2 if in_block(tensor) else 1)


class TwoOptimizers:
    name, version, policy = "Muon beside AdamW", "1", Policy()
    claimed = ("gpt-shape", "microbatches", "clip", "schedule", "dropout", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="train() has no such option")
    lacks |= dict.fromkeys(("any-optimizer", "keywords"), "Muon and AdamW are fixed, with settings of their own")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
