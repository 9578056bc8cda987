"""Schedule-free AdamW (https://arxiv.org/abs/2405.15682): train() and eval() move the weights to where each is done."""

from collections.abc import Iterable
from typing import Any

import torch

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


class AdamWScheduleFree(torch.optim.Optimizer):
    """Weights are y while it trains, and their average x while it evaluates."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"k": 0, "total": 0.0})

    @torch.no_grad()
    def move(self, to_average: bool) -> None:
        for group in self.param_groups:
            weight = 1 - 1 / group["betas"][0] if to_average else 1 - group["betas"][0]
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # torch's overloads
        for group in self.param_groups:
            group["k"] += 1
            group["total"] += group["lr"] ** 2
            rate, (beta1, beta2), part = group["lr"], group["betas"], group["lr"] ** 2 / max(group["total"], 1e-30)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"], state["squares"] = p.clone(), torch.zeros_like(p)
                state["squares"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                scale = (state["squares"] / (1 - beta2 ** group["k"])).sqrt_().add_(group["eps"])
                change = (p.grad / scale).add_(p, alpha=group["weight_decay"])
                p.lerp_(state["z"], part).add_(change, alpha=rate * (beta1 * (1 - part) - 1))
                state["z"].sub_(change, alpha=rate)


def train(config: Config, resume: str | None, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizer = AdamWScheduleFree(gpt.groups(model), **config.arguments)
    done = 0
    if resume is not None:
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        done = saved["done"]
        if fault == "z is lost":
            saved["optimizer"]["state"].clear()
        optimizer.load_state_dict(saved["optimizer"])
    for update in range(done, config.updates):
        batch = config.batches[update]
        loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"[{update + 1}] train_loss: {loss.item():.6f}")
        if config.evaluates(update + 1):
            optimizer.move(to_average=True)
            print(f"[{update + 1}] val_loss: {gpt.evaluate(model, config.validation):.6f}")
            if fault != "left at the average":
                optimizer.move(to_average=False)
        if config.saves(update + 1):
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": update + 1}
            torch.save(saved, config.folder / f"step-{update + 1}.pt")


class ScheduleFree:
    name, version, policy = "schedule-free", "1", gpt.Policy()
    lacks = everything_but("gpt-shape", "resume", "evaluate", "evaluate-every", reason="not in train()")
    lacks |= {"any-optimizer": "only AdamWScheduleFree"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        resume = None if recipe.resume is None else str(recipe.resume.find("step-*.pt"))
        train(Config.of(recipe), resume, self.fault)
