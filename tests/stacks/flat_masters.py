"""Flat float32 master copies, one for each group, of which each process has its share, as ZeRO-1 has them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


class FlatMasters:
    """Makes the model's tensors views of one memory for each group, and steps a flat float32 copy of each."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, fault: str) -> None:
        self.model, self.optimizer, self.fault = model, optimizer, fault
        self.tensors: list[list[Tensor]] = [list(group["params"]) for group in optimizer.param_groups]
        self.memories = [torch.cat([t.detach().flatten() for t in tensors]) for tensors in self.tensors]
        for tensors, memory in zip(self.tensors, self.memories):
            for tensor, view in zip(tensors, memory.split([t.numel() for t in tensors])):
                tensor.data = view.view_as(tensor)
        self.masters = [nn.Parameter(memory.clone().float()) for memory in self.memories]
        for group, master in zip(optimizer.param_groups, self.masters):
            group["params"] = [master]
            master.grad = torch.zeros_like(master)
        rates = [group["lr"] for group in optimizer.param_groups]
        if fault != "the first step decays":
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        optimizer.step()  # allocates its state
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        for entry in optimizer.state.values():
            entry["step"].zero_()

    def step(self, limit: float | None) -> float:
        """Clip, step group by group, copy back, clear the gradients; return their norm."""
        groups = self.optimizer.param_groups
        for tensors, master in zip(self.tensors, self.masters):
            master.grad = torch.cat([t.grad.flatten().float() for t in tensors if t.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.masters, limit or math.inf).item()
        for index, (group, master, memory) in enumerate(zip(groups, self.masters, self.memories)):
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            if not (self.fault == "the last group is not copied back" and index == len(groups) - 1):
                memory.copy_(master.detach())
        self.optimizer.param_groups = groups
        self.model.zero_grad()
        return norm


def train(config: Config, resume: str | None, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    saved: dict[str, Any] = torch.load(resume, weights_only=True) if resume else {}
    if saved:
        model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(gpt.groups(model), **config.arguments)
    flat = FlatMasters(model, optimizer, fault)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        for master, value in zip(flat.masters, saved["masters"]):
            master.data.copy_(value)
    data = iter(zip(config.batches, config.labels))
    done = saved.get("done", 0)
    for _ in range(done * config.accumulate):
        next(data)
    for update in range(done, config.updates):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(update)
        total = 0.0
        for _ in range(config.accumulate):
            batch, labels = next(data)
            loss = cross_entropy(model(batch[:, :-1]), labels[:, 1:]) / config.accumulate
            loss.backward()
            total += loss.item()
        norm = flat.step(config.clip)
        print(f"step {update + 1} | train loss {total:.6f} | lr {config.rate(update):.3e} | grad norm {norm:.4f}")
        if config.evaluates(update + 1):
            print(f"step {update + 1} | val loss {gpt.evaluate(model, config.validation):.6f}")
        if config.saves(update + 1):
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": update + 1}
            kept["masters"] = [master.detach() for master in flat.masters]
            torch.save(kept, config.folder / f"step-{update + 1}.pt")


class FlatMasterCopies:
    name, version, policy = "flat master copies", "1", gpt.Policy()
    claimed = ("keywords", "gpt-shape", "microbatches", "clip", "schedule", "resume", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="train() has no such option") | {"any-optimizer": "AdamW is fixed"}

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        resume = None if recipe.resume is None else str(recipe.resume.find("step-*.pt"))
        train(Config.of(recipe), resume, self.fault)
