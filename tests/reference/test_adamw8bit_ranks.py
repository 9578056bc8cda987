"""AdamW8bit on two ranks, replicated (DDP) and sharded (FSDP2), takes the steps of one process."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from reference.optimizers.adamw8bit import AdamW8bit

WIDTH, UPDATES = 128, 5  # each half of a weight is 32 blocks of 256


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))


def train(module: nn.Module, rows: slice) -> dict[str, Tensor]:
    optimizer = AdamW8bit(module.parameters(), lr=1e-3, weight_decay=0.1)
    for update in range(UPDATES):
        inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(update))
        module(inputs[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name.removeprefix("module."): tensor.detach() for name, tensor in module.named_parameters()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in weights.items()}


def sharded(module: nn.Module) -> nn.Module:
    for layer in module.children():
        fully_shard(layer)
    fully_shard(module)
    return module


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def run_rank(rank: int, way: str, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(train(WAYS[way](model()), slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_take_the_steps_of_one(way: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (way, port, str(tmp_path)), nprocs=2)
    alone, start = train(model(), slice(None)), dict(model().named_parameters())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        # Gradients are summed in another order: 4e-7 of the way.
        moved = (expected - start[name]).norm()
        assert (first[name] - expected).norm() < 1e-5 * moved, name
