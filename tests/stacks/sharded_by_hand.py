"""FSDP2 by hand: ``fully_shard`` on each block, the optimizer made afterwards, checkpoints of whole tensors."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from conformance import Checkpoint, Recipe, everything_but
from tests.stacks import gpt
from tests.stacks.gpt import Config, cross_entropy

FILE = "checkpoint.pt"


def train(config: Config, sharded: bool, resume: Path | None, fault: str) -> None:
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.fsdp import fully_shard

    ranks = int(os.environ["WORLD_SIZE"]) if sharded else 1
    rank = int(os.environ["RANK"]) if sharded else 0
    torch.manual_seed(config.seed + (rank if fault == "each rank draws its own weights" else 0))
    model = gpt.GPT(**config.shape)
    if sharded:
        distributed.init_process_group("gloo")
        mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        for block in (*model.blocks, model):
            fully_shard(block, mesh=mesh)
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
        parameters = list(model.parameters())
        if config.clip is not None and fault == "each rank clips by its own norm" and sharded:
            gradients: Any = [p.grad for p in parameters]
            norm = torch.stack([g.to_local().norm() for g in gradients]).norm()
            for gradient in gradients:
                gradient.to_local().mul_((config.clip / norm).clamp(max=1.0))
        elif config.clip is not None:
            nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if config.saves(update + 1):
            content = {
                "model": states.get_model_state_dict(model, options=whole),
                "optimizer": states.get_optimizer_state_dict(model, optimizer, options=whole),
                "updates": update + 1,
            }
            if rank == 0:
                folder = config.folder / f"update-{update + 1}"
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(content, folder / FILE)


class ShardedByHand:
    name, version, policy = "FSDP2 by hand", "1", gpt.Policy()
    lacks = everything_but(
        "gpt-shape", "clip", "any-optimizer", "resume", "two-ranks", "sharded", reason="train() has no such option"
    )

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def train(self, recipe: Recipe) -> None:
        sharded = recipe.world_size > 1  # two ranks are always sharded here
        rank = int(os.environ["RANK"]) if sharded else 0
        config = replace(Config.of(recipe), batches=recipe.batches(rank))
        resume = recipe.resume.find(FILE) if isinstance(recipe.resume, Checkpoint) else None
        train(config, sharded, resume, self.fault)
