"""What the scripts deepspeed-*.py share: an engine with ZeRO-1 on the CPU, in one process or several."""

import os
import socket

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import multiprocessing, nn
from torch.nn.functional import cross_entropy

deepspeed.logger.setLevel("ERROR")


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def engine_of(accumulate=1, dropout=0.0):
    """Return an engine for a bigram model, the same on all ranks; SGD, so that a step shows the gradient."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Dropout(dropout), nn.Linear(8, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def loss_of(engine, ids, labels):
    return cross_entropy(engine(ids).flatten(0, 1), labels.flatten())


def in_process(rank, world, address, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": address}
    deepspeed.init_distributed("gloo", verbose=False)
    function(rank, *arguments)
    deepspeed.comm.destroy_process_group()


def run(function, *arguments, world=1):
    """Call a function with the rank and the arguments in as many processes."""
    multiprocessing.spawn(in_process, (world, port(), function, arguments), world)
