"""Tensor parallelism by hand: each block's MLP is split over the ranks, which all train on the same sequences.

To the suite this is a run that splits its parameters (``sharded``): two ranks that make the updates of one process.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from conformance import Checkpoint, NotApplicable, Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy

FILE = "checkpoint.pt"


def split(model: gpt.GPT) -> None:
    """Split the MLPs: the first matrix by its rows, the second by its columns, which needs one sum behind it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def norm_of(gradients: list[Any], whole: bool) -> Tensor:
    """Return the norm of all gradients: of whole tensors, or (a fault) of this rank's parts."""
    parts = [(g.full_tensor() if whole else g.to_local()) if hasattr(g, "placements") else g for g in gradients]
    return torch.stack([part.norm() for part in parts]).norm()


def train(config: Config, parallel: bool, resume: Path | None, fault: str) -> None:
    from torch.distributed.checkpoint import state_dict as states

    torch.manual_seed(config.seed)
    model = gpt.GPT(**config.shape)
    if parallel:
        distributed.init_process_group("gloo")
        split(model)
        if fault == "every rank adds the bias":
            for block in model.blocks:
                down: Any = block.down
                down.register_forward_hook(lambda module, _, out: out + module.bias.full_tensor())
    optimizer = config.optimizer(gpt.groups(model), **config.arguments)
    whole = states.StateDictOptions(full_state_dict=True)
    done = 0
    if resume is not None:
        kept: dict[str, Any] = torch.load(resume, weights_only=False)
        states.set_model_state_dict(model, kept["model"], options=whole)
        states.set_optimizer_state_dict(model, optimizer, kept["optimizer"], options=whole)
        done = kept["updates"]
    for update in range(done, config.updates):
        batch = config.batches[update]
        cross_entropy(model(batch[:, :-1]), batch[:, 1:]).backward()
        if config.clip is not None:
            gradients: list[Any] = [p.grad for p in model.parameters()]
            norm = norm_of(gradients, whole=fault != "each rank clips by its own norm")
            for gradient in gradients:
                gradient.mul_((config.clip / norm).clamp(max=1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        if config.saves(update + 1):
            content = {
                "model": states.get_model_state_dict(model, options=whole),
                "optimizer": states.get_optimizer_state_dict(model, optimizer, options=whole),
                "updates": update + 1,
            }
            if not parallel or distributed.get_rank() == 0:
                folder = config.folder / f"update-{update + 1}"
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(content, folder / FILE)


class TensorParallel:
    name, version, policy = "tensor parallelism by hand", "1", gpt.Policy()
    lacks = everything_but(
        "gpt-shape", "clip", "any-optimizer", "resume", "two-ranks", "sharded", reason="train() has no such option"
    )

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        if recipe.world_size > 1 and not recipe.sharded:
            raise NotApplicable("two ranks always share one model here, and train on the same sequences")
        shares = [recipe.batches(rank) for rank in range(recipe.world_size)]
        config = replace(Config.of(recipe), batches=[torch.cat(parts) for parts in zip(*shares, strict=True)])
        resume = recipe.resume.find(FILE) if isinstance(recipe.resume, Checkpoint) else None
        train(config, "RANK" in os.environ and recipe.sharded, resume, self.fault)
