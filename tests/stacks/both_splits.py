"""As nanoGPT's script: evaluates before an update, on training data too, and makes one update after the last save."""

from typing import Any

import torch
from torch import Tensor, nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def train(config: Config, resume: Any, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizer = config.optimizer(gpt.groups(model), **config.arguments)
    done, interval = 0, config.evaluate_every or config.save_every or config.updates
    if resume:
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    while True:
        if done % interval == 0 or done == config.updates:
            losses = {"train": gpt.evaluate(model, config.batches[:2]), "val": gpt.evaluate(model, config.validation)}
            if fault == "one loss for both splits":
                losses["val"] = (losses["train"] + losses["val"]) / 2
            print(f"step {done}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            if done:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
                torch.save(saved, config.folder / "ckpt.pt")
        rate = config.arguments["lr"] if done == config.updates else config.rate(done)
        if fault == "the schedule has no end" and done == config.updates == config.warmup:
            raise ValueError("the cosine has a length of zero")
        for group in optimizer.param_groups:
            group["lr"] = rate * (2 if fault == "twice the rate" else 1)
        microbatches: list[Tensor] = [*config.batches, *config.batches[: config.accumulate]]
        for rows in microbatches[done * config.accumulate : (done + 1) * config.accumulate]:
            (cross_entropy(model(rows[:, :-1]), rows[:, 1:]) / config.accumulate).backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        if done > config.updates:
            break


class BothSplits:
    name, version, policy = "both splits", "1", gpt.Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "clip", "schedule", "resume", "evaluate", "evaluate-every")
    lacks = everything_but(*claimed, reason="train() has no such option")

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        train(Config.of(recipe), recipe.resume and recipe.resume.find("ckpt.pt"), self.fault)
