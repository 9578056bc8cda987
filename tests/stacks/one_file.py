"""One ckpt.pt, written over at every save, and taken up from the same folder, as nanoGPT does."""

import shutil

import torch
from torch import nn

from conformance import Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy


def train(config: Config, resume: bool, fault: str) -> None:
    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    optimizer = config.optimizer(gpt.groups(model), **config.arguments)
    file, done = config.folder / "ckpt.pt", 0
    if resume:
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        if fault != "the moments start again":
            optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        done = saved["done"]
    for update in range(done, config.updates):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(update)
        for i in range(update * config.accumulate, (update + 1) * config.accumulate):
            logits = model(config.batches[i][:, :-1])
            (cross_entropy(logits, config.batches[i][:, 1:]) / config.accumulate).backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if config.saves(update + 1):
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": update + 1}
            if fault == "one update is done twice":
                saved["done"] = update
            torch.save(saved | {"random": torch.get_rng_state()}, file)


class OneFile:
    name, version, policy = "one ckpt.pt", "1", gpt.Policy()
    lacks = everything_but(
        "gpt-shape",
        "tied",
        "microbatches",
        "clip",
        "schedule",
        "dropout",
        "resume",
        reason="train() has no such option",
    )

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        if recipe.resume is not None:
            shutil.copy(recipe.resume.find("ckpt.pt"), recipe.directory)
        train(Config.of(recipe), recipe.resume is not None, self.fault)
