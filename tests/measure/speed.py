"""What each way to train faster gives on one GPU: rows of ``Trainer.fit`` that differ in one thing.

``python -m tests.measure.speed --write FILE`` on a GPU; some nine minutes. ``--only TEXT`` takes rows with this in
their name. The file is written anew after each row. Without a GPU a small version of all rows runs, whose figures mean
nothing.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reference.cli.presets import PRESETS
from reference.config import GPTConfig
from reference.data.tokens import Batch
from reference.training.batches import Pairs
from reference.training.run import Done, Run
from tests.measure.rows import Report, Row, Workers, measure, precompile, prepared

SECONDS = 525.0  # for everything
COMPILING = 5  # processes side by side; a microbatch of 64 takes 29 GB
TUNED: dict[str, Any] = {"coordinate_descent_tuning": True}

SMALL = PRESETS["gpt2-124m"]
MIXED = replace(SMALL.train, microbatches=8, warmup=2)
TRUE = replace(MIXED, precision="bf16-true")
LARGE = replace(TRUE, optimizer_args={"lr": 2e-4, "weight_decay": 0.1}, microbatches=4)
BARE = replace(SMALL.model, bias=False)
LLAMA = GPTConfig.llama(block_size=1024)
WIDE = GPTConfig.gpt2(n_layer=24, n_head=16, n_embd=2048, bias=False)


def update_without_haste(
    self: Run, update: int, pairs: Pairs, batches: Iterator[Batch] | None = None, at_once: bool = False
) -> Done:
    """Do an update, and launch nothing of the next one before its figures are read."""
    return UPDATE_ONCE(self, update, pairs, batches)


UPDATE_ONCE = Run.update_once
WAITING: dict[str, Any] = {"reference.training.run.Run.update_once": update_without_haste}


def rows() -> tuple[list[Row], list[Row]]:
    """The rows that are compiled side by side, and those that are tuned while they compile, alone on the GPU."""
    base = Row("124M", SMALL.model, MIXED, 64)
    large = Row("1.3B Llama, bf16-true", LLAMA, LARGE, 16)
    curve = replace(MIXED, microbatches=1, optimizer_args={"lr": 6e-4, "weight_decay": 0.1}, warmup=30)
    curves = [
        Row(f"300 updates of 124M, {kind}", SMALL.model, replace(curve, float8=kind), 16, updates=300, losses=True)
        for kind in ("none", "tensorwise", "rowwise")
    ]
    plain = [
        base,
        replace(base, name="124M, one microbatch", train=replace(MIXED, microbatches=1)),
        replace(
            base,
            name="124M, one microbatch, no forward before the host waits",
            train=replace(MIXED, microbatches=1),
            constants=WAITING,
        ),
        replace(base, name="124M, cuDNN attention", attention="cudnn"),
        replace(base, name="124M, flash attention", attention="flash"),
        replace(base, name="124M, loss with its gradients, 1 piece", chunks=1),
        replace(base, name="124M, loss with its gradients, 4 pieces", chunks=4),
        replace(base, name="124M, loss with its gradients, 8 pieces", chunks=8),
        replace(base, name="124M, microbatch 128", microbatch=128, train=replace(MIXED, microbatches=4), chunks=4),
        large,
        replace(large, name="1.3B Llama, bf16-true, tensorwise float8", train=replace(LARGE, float8="tensorwise")),
        replace(large, name="1.3B Llama, bf16-true, rowwise float8", train=replace(LARGE, float8="rowwise")),
        replace(large, name="1.3B Llama, bf16-true, cuDNN attention", attention="cudnn"),
        *curves,
        replace(base, name="124M again"),
    ]
    tuned = [
        replace(base, name="124M, tuned", inductor=TUNED, limit=240),
        replace(
            base, name="124M, tuned, cuDNN attention, loss in 4 pieces", inductor=TUNED, attention="cudnn", chunks=4
        ),
        Row("124M without biases, tuned, cuDNN attention, loss in 4 pieces", BARE, MIXED, 64, "cudnn", 4, TUNED),
        Row("124M without biases, bf16-true, the same", BARE, TRUE, 64, "cudnn", 4, TUNED),
        Row("1.3B Llama, bf16-true, tuned, cuDNN attention, loss in 4 pieces", LLAMA, LARGE, 16, "cudnn", 4, TUNED),
        Row("1.3B in GPT-2's shape without biases, the same", WIDE, LARGE, 16, "cudnn", 4, TUNED),
    ]
    return plain, tuned


def in_turn(plain: list[Row]) -> list[Row]:
    """One row of each graph, large models and small ones in turn, so that what compiles side by side fits the GPU."""
    graphs = {
        (row.model, row.train.precision, row.train.float8, row.microbatch, row.attention, row.chunks): row
        for row in reversed(plain)
    }
    large = [row for row in reversed(graphs.values()) if row.model.n_embd > 1024]
    small = [row for row in reversed(graphs.values()) if row.model.n_embd <= 1024]
    ordered = []
    for number, row in enumerate(small):
        ordered += [large.pop(0), row] if large and number % 3 == 0 else [row]
    return ordered + large


def first_the_first(plain: list[Row], tuned: list[Row]) -> list[Row]:
    """The rows in the order in which they are wanted, should the time not suffice."""
    return plain[:1] + tuned[:1] + plain[1:9] + tuned[1:2] + plain[9:12] + tuned[2:5] + plain[12:] + tuned[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--processes", type=int, default=COMPILING, help="that compile side by side")
    arguments = parser.parse_args()
    began, small = time.monotonic(), not torch.cuda.is_available()

    def left() -> float:
        return float(arguments.seconds) - (time.monotonic() - began)

    plain, tuned = (
        [row for row in each if not arguments.only or any(word in row.name for word in arguments.only)]
        for each in rows()
    )
    report = Report(arguments.write, "Trainer.fit on one GPU; rows differ in what their names say")
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder), small)
        print(f"text prepared after {time.monotonic() - began:.0f} s", flush=True)
        report.figures["compiled side by side"] = precompile(
            in_turn(plain), data, small, arguments.processes, min(150.0, left() / 3)
        )
        report.write()
        print(f"compiled after {time.monotonic() - began:.0f} s: {report.figures['compiled side by side']}", flush=True)
        workers = Workers(1, data, small)
        try:
            measure(first_the_first(plain, tuned), workers, report, left)
        finally:
            workers.stop()
    report.figures["seconds"] = round(time.monotonic() - began)
    report.write()


if __name__ == "__main__":
    main()
