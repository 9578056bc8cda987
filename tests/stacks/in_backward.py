"""Each tensor has an optimizer of its own, which steps as soon as the gradient is there and frees it."""

from typing import Any

import torch
from torch import Tensor

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def train(config: Config, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizers: dict[Tensor, torch.optim.Optimizer] = {}
    for p in model.parameters():
        group: dict[str, Any] = {"params": [p]}
        if p.ndim < 2 and fault != "everything decays":
            group["weight_decay"] = 0.0
        optimizers[p] = config.optimizer([group], **config.arguments)

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for update, batch in enumerate(config.batches):
        for number, optimizer in enumerate(optimizers.values()):
            if number == 0 or fault != "one optimizer is scheduled":
                optimizer.param_groups[0]["lr"] = config.rate(update)
        loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()  # and all steps
        print(f"update {update + 1}: loss={loss.item():.6f} lr={config.rate(update):.6g}")
        if config.evaluates(update + 1):
            print(f"update {update + 1}: val_loss={gpt.evaluate(model, config.validation):.6f}")


class InBackward:
    name, version, policy = "optimizer in backward", "1", gpt.Policy()
    lacks = everything_but(
        "gpt-shape", "tied", "schedule", "dropout", "evaluate", "evaluate-every", reason="steps happen inside backward"
    )

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), self.fault)
