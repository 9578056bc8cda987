"""What a second GPU gives: rows of ``Trainer.fit`` on one and on two GPUs of a machine, with as much work for each.

``python -m tests.measure.scaling --write FILE`` on a machine with two GPUs; some six minutes. The file is written anew
after each row, and ends with each row's share of what one GPU does: of the first, and of the slower of the two. Without
a GPU a small version runs on two processes, whose figures mean nothing.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from reference.cli.presets import PRESETS
from reference.config import GPTConfig, TrainConfig
from tests.measure.rows import Report, Row, Workers, measure, prepared

SECONDS = 350.0  # for everything
SMALL = PRESETS["gpt2-124m"]
FOUR = replace(SMALL.train, microbatches=4, warmup=2)
ONE = replace(FOUR, microbatches=1)
LARGE = replace(FOUR, precision="bf16-true", optimizer_args={"lr": 2e-4, "weight_decay": 0.1})
LLAMA = GPTConfig.llama(block_size=1024)
LARGE_MODEL = replace(LLAMA, fp32_residual=False)


def by_name(config: TrainConfig) -> str:
    """Return Fabric's own strategy, in place of reference.training.launch.choose_strategy."""
    return config.strategy


DDP: dict[str, Any] = {"reference.training.launch.choose_strategy": by_name}
WHOLE: dict[str, Any] = {"optimize_ddp": False}
SHARD = "reference.training.sharding.fully_shard"
KEPT = partial(fully_shard, reshard_after_forward=False)
OTHER = ", on the other GPU"
NO_SYNC = "lightning.fabric.strategies.model_parallel._FSDPNoSync._set_requires_grad_sync"
NARROW = partial(fully_shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def until_the_last(self: Any, requires_grad_sync: bool) -> None:
    """Keep gathered weights, as Fabric keeps gradients, until the last backward of an update."""
    for part in self._module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(requires_grad_sync, recurse=False)
            part.set_reshard_after_backward(requires_grad_sync, recurse=False)


def two(config: TrainConfig, strategy: str = "ddp") -> TrainConfig:
    """Return a run on two ranks."""
    return replace(config, devices=2, strategy=strategy)


def rows() -> list[tuple[Row, str]]:
    """The rows, each with the one on one GPU that it is compared with."""
    small = Row("124M, 4 microbatches", SMALL.model, FOUR, 64)
    single = replace(small, name="124M, 1 microbatch", train=ONE)
    true = Row("1.3B, bf16-true", LARGE_MODEL, LARGE, 16)
    mixed = replace(true, name="1.3B, bf16-mixed", train=replace(LARGE, precision="bf16-mixed"))
    found = [(small, ""), (single, "")]
    for base in (small, single):
        pair = replace(base, name=f"{base.name}, replicas", train=two(base.train))
        found += [
            (pair, base.name),
            (replace(pair, name=f"{base.name}, DDP", constants=DDP), base.name),
            (replace(pair, name=f"{base.name}, DDP, graph not cut", constants=DDP, dynamo=WHOLE), base.name),
        ]
    found += [(true, ""), (replace(true, name=f"{true.name}, replicas", train=two(true.train)), true.name)]
    sharded = replace(true, name=f"{true.name}, FSDP", train=two(true.train, "fsdp"))
    found.append((sharded, true.name))
    found.append((mixed, ""))
    of_mixed = replace(mixed, name=f"{mixed.name}, FSDP", train=two(mixed.train, "fsdp"))
    found.append((of_mixed, mixed.name))
    for name, function in (("blocks kept until backward", KEPT), ("gathered in bfloat16", NARROW)):
        for row, base in ((sharded, true), (of_mixed, mixed)):
            if row is of_mixed or function is KEPT:
                found.append((replace(row, name=f"{row.name}, {name}", constants={SHARD: function}), base.name))
    once = {SHARD: KEPT, NO_SYNC: until_the_last}
    found.append((replace(sharded, name=f"{sharded.name}, gathered once in an update", constants=once), true.name))
    for size in (8, 128):
        piece = {"reference.training.replication.PIECE": size * 2**20}
        name = f"{single.name}, replicas, pieces of {size} Mi elements"
        found.append((replace(single, name=name, train=two(ONE), constants=piece), single.name))
    found.append((replace(small, name="124M, 4 microbatches, again"), ""))
    return found


@contextmanager
def ended(workers: Workers) -> Iterator[Workers]:
    """Give the processes, and end them afterwards."""
    try:
        yield workers
    finally:
        workers.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    arguments = parser.parse_args()
    began, small = time.monotonic(), not torch.cuda.is_available()
    if not small and torch.cuda.device_count() < 2:
        print(f"Two GPUs are needed, but there are {torch.cuda.device_count()}.")
        return 2

    def left() -> float:
        return float(arguments.seconds) - (time.monotonic() - began)

    wanted = [
        (row, base) for row, base in rows() if not arguments.only or any(word in row.name for word in arguments.only)
    ]
    report = Report(arguments.write, "Trainer.fit on one GPU and on two, as much work for each")
    alone = [row for row, base in wanted if not base and not row.name.endswith("again")]
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder), small)
        with ended(Workers(2, data, small)) as workers:
            measure([row for row, _ in wanted], workers, report, left)
        # Two cards differ by some percent under a cap on power, and ranks that wait for each other are as fast as the
        # slower one: what communication costs shows beside that one.
        with patch.dict(os.environ, CUDA_VISIBLE_DEVICES="1"), ended(Workers(1, data, small)) as workers:
            measure([replace(row, name=row.name + OTHER) for row in alone], workers, report, left)
    done = {name: found for name, found in report.figures["rows"].items() if "skipped" not in found}
    shares: dict[str, dict[str, float]] = {"share of one GPU": {}, "share of the slower GPU": {}}
    for row, base in wanted:
        speeds = [done[name]["tokens_per_second_and_gpu"] for name in (row.name, base, base + OTHER) if name in done]
        if base and row.name in done and base in done:
            shares["share of one GPU"][row.name] = round(speeds[0] / speeds[1], 4)
            if base + OTHER in done:
                shares["share of the slower GPU"][row.name] = round(speeds[0] / min(speeds[1:]), 4)
    report.figures |= shares
    for kind, each in shares.items():
        for name, share in each.items():
            print(f"{name}: {share:.1%}, {kind}", flush=True)
    report.figures["seconds"] = round(time.monotonic() - began)
    report.write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
