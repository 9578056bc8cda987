"""A run on one process, or on several in one of the ways that PyTorch has: started by torchrun for the tests."""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--kind", choices=("one", "ddp", "fsdp2", "tensor-parallel", "none"), default="one")
parser.add_argument("--fault", default="")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
options = parser.parse_args()
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if options.device == "cuda":
    torch.cuda.set_device(rank)
if world > 1:
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")

torch.manual_seed(rank if options.fault == "start" else 0)
inner = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
model: Any = nn.Sequential(nn.Embedding(32, 16), inner, nn.LayerNorm(16), nn.Linear(16, 32))
model.to(options.device)
called = model
if options.kind == "ddp":
    called = DistributedDataParallel(model)
elif options.kind == "fsdp2":
    mesh = dist.device_mesh.init_device_mesh(options.device, (world,))
    fully_shard(inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
elif options.kind == "tensor-parallel":
    mesh = dist.device_mesh.init_device_mesh(options.device, (world,))
    parallelize_module(inner, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
# On a GPU AdamW takes all tensors in one call, which refuses DTensors beside tensors that are not split.
foreach = False if options.kind == "tensor-parallel" else None
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, foreach=foreach)

data = torch.Generator().manual_seed(1)
for _ in range(4):
    batch = torch.randint(32, (8, 9), generator=data).to(options.device)
    if options.kind != "tensor-parallel" and options.fault != "data":
        batch = batch[rank::world].contiguous()
    inputs, targets = batch[:, :-1], batch[:, 1:]
    loss = nn.functional.cross_entropy(called(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    if options.fault == "one tensor" and rank == 1:
        model[3].bias.grad.mul_(2)
    if options.fault == "clipped":  # reduced by hand but for one tensor, which moves the norm that all are clipped by
        for name, parameter in model.named_parameters():
            if name != "3.bias":
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
if world > 1:
    dist.destroy_process_group()
