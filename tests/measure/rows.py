"""What tests.measure.speed and tests.measure.scaling share: one row is one run of ``Trainer.fit``, and what it gave.

Rows run one after the other in processes that stay (a process for each rank), so that imports are paid once. A row that
fails or takes too long costs that row: its processes are replaced.
"""

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from conformance.recording.ranks import free_port
from conformance.report.environment import environment
from reference.config import GPTConfig, TrainConfig

WARMUP, MEASURED = 3, 6  # updates; the first compiles
HOST_GAP = 10.0  # microseconds; a longer gap between two kernels is the host's
SMALL: dict[str, Any] = {"vocab_size": 512, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
SMALL_MICROBATCH = 2


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    model: GPTConfig
    train: TrainConfig
    microbatch: int
    """Sequences."""
    attention: str = ""
    """Which kernels attention prefers: ``cudnn`` or ``flash``. Empty: PyTorch decides."""
    chunks: int = 0
    """Pieces in which head and loss are computed together, with their gradients, in forward. 0: as the trainer does."""
    inductor: dict[str, Any] = field(default_factory=dict)
    """Settings of torch._inductor.config."""
    dynamo: dict[str, Any] = field(default_factory=dict)
    """Settings of torch._dynamo.config."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Other values for constants of the reference, by their paths: ``reference.training.replication.PIECE``."""
    limit: float = 120.0
    """Seconds after which the row is given up."""
    updates: int = WARMUP + MEASURED
    losses: bool = False
    """Keep the loss of every update."""

    def small(self) -> "Row":
        """Return the row as a computer without a GPU can run it in a second."""
        model = replace(self.model, **SMALL, n_kv_head=None, intermediate_size=None)
        train = replace(self.train, accelerator="cpu", microbatches=min(2, self.train.microbatches), float8="none")
        return replace(self, model=model, train=train, microbatch=SMALL_MICROBATCH, inductor={})


@contextmanager
def as_row(row: Row) -> Iterator[None]:
    """Inside, everything is as the row asks beside its configuration."""
    with ExitStack() as stack:
        if torch.cuda.is_available():
            torch._dynamo.reset()
        else:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if row.attention and torch.cuda.is_available():
            from torch.nn.attention import SDPBackend, sdpa_kernel

            first = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[row.attention]
            rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel([first, *(kind for kind in rest if kind != first)], set_priority=True))
        if row.chunks:
            from tests.measure.fused_loss import FusedLoss

            stack.enter_context(mock.patch("reference.training.setup.TokenLoss", partial(FusedLoss, chunks=row.chunks)))
        if row.inductor:
            stack.enter_context(importlib.import_module("torch._inductor.config").patch(row.inductor))
        if row.dynamo:
            stack.enter_context(importlib.import_module("torch._dynamo.config").patch(row.dynamo))
        for path, value in row.constants.items():
            stack.enter_context(mock.patch(path, value))
        yield


def run(row: Row, data: Path) -> dict[str, Any]:
    """One run of ``Trainer.fit``, on whatever ranks there are."""
    from reference.data.tokens import TokenData
    from reference.training.throughput import device_peak, flops_per_token
    from reference.training.trainer import Record, Trainer

    on_gpu = torch.cuda.is_available() and row.train.accelerator != "cpu"
    profiler = gpu_profiler() if on_gpu else None
    last = row.updates

    def watch(record: Record) -> None:
        if profiler is not None and record.update == last:
            profiler.start()

    warmup, more = min(row.train.warmup, last), 1 if on_gpu else 0
    train = replace(row.train, updates=last + more, warmup=warmup, evaluate_every=None, save_every=None, log_every=1000)
    with tempfile.TemporaryDirectory() as folder, as_row(row), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        tokens = TokenData(data, "train", block_size=row.model.block_size, microbatch_size=row.microbatch, seed=1)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = Trainer(row.model, train, folder, [watch]).fit(tokens)
        if on_gpu:
            torch.cuda.synchronize()
        if profiler is not None:
            profiler.stop()
        whole = time.perf_counter() - began
    seconds = [record.seconds for record in result.records[WARMUP:last] or result.records]
    rate = result.records[0].tokens / statistics.median(seconds)
    ranks = train.devices * train.num_nodes
    peak = device_peak(torch.device("cuda"), train.precision) if on_gpu else None
    found: dict[str, Any] = {
        "tokens_per_second": round(rate),
        "tokens_per_second_and_gpu": round(rate / ranks),
        "mfu": None
        if peak is None
        else round(rate * flops_per_token(row.model, row.model.block_size) / peak / ranks, 4),
        "first_update_s": round(result.records[0].seconds, 1),
        "whole_row_s": round(whole, 1),
        "seconds_per_update": [round(value, 5) for value in seconds[-MEASURED:]],
        "tokens_per_update": result.records[0].tokens,
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "warnings": sorted({str(warning.message).splitlines()[0][:200] for warning in heard}),
        "loss": [round(record.loss, 5) for record in result.records[: last if row.losses else WARMUP]],
    }
    if profiler is not None:
        found |= kernels(profiler)
    return found


def gpu_profiler() -> Any:
    """A profiler of kernels alone."""
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA])


def kernels(profiler: Any) -> dict[str, Any]:
    """Where the time of one update goes: the longest kernels, and the shares in which none ran."""
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    if not spans:
        return {}
    gaps, end = [], spans[0][0]
    for begin, finish in spans:
        gaps.append(max(0.0, begin - end))
        end = max(end, finish)
    whole = end - spans[0][0]
    waits = [gap for gap in gaps if gap > HOST_GAP]
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:16]
    return {
        "share_of_time_the_gpu_waits_for_the_host": round(sum(waits) / whole, 5),
        "share_of_time_between_queued_kernels": round((sum(gaps) - sum(waits)) / whole, 5),
        "longest_wait_in_microseconds": round(max(gaps), 1),
        "profiled_update_ms": round(whole / 1e3, 2),
        "kernels_ms": {name: [round(sum(each) / 1e3, 2), len(each)] for name, each in longest},
    }


class Workers:
    """Processes that run rows: one, or one for each rank of a run."""

    def __init__(self, ranks: int, data: Path, small: bool) -> None:
        self.ranks, self.data, self.small = ranks, data, small
        self.processes: list[tuple[Any, Connection]] = []

    def start(self) -> None:
        """Start them, if they do not run."""
        if self.processes:
            return
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.ranks, port, self.data, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append((process, ours))

    def stop(self) -> None:
        """End them, whatever they do."""
        for process, pipe in self.processes:
            process.kill()
            process.join()
            pipe.close()
        self.processes = []

    def run(self, row: Row, seconds: float) -> dict[str, Any]:
        """The figures of rank 0, or ``{"skipped": why}``."""
        self.start()
        wanted = row.small() if self.small else row
        asked = [number for number in range(self.ranks) if number == 0 or row.train.devices > 1]
        for number in asked:
            self.processes[number][1].send(wanted)
        until, answers = time.monotonic() + min(seconds, row.limit), []
        for number in asked:
            pipe = self.processes[number][1]
            try:
                if not pipe.poll(max(0.0, until - time.monotonic())):
                    self.stop()
                    return {"skipped": f"It did not end within {min(seconds, row.limit):.0f} s."}
                answers.append(pipe.recv())
            except (EOFError, OSError):
                self.stop()
                return {"skipped": f"The process of rank {number} died."}
        failed = [answer for answer in answers if "skipped" in answer]
        if failed:
            self.stop()  # the memory may hold anything
            return failed[0]  # type: ignore[no-any-return] # from a pipe
        return answers[0]  # type: ignore[no-any-return] # from a pipe


def serve(rank: int, ranks: int, port: int, data: Path, pipe: Connection) -> None:
    """What each process does until its pipe is closed."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables = {name: str(value) for name, value in place.items()}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "measure"}
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    while True:
        try:
            row = pipe.recv()
        except EOFError:
            return
        for name in variables:  # so that Fabric finds its rank, or that there is one process only
            os.environ.pop(name, None)
        if row.train.devices > 1:
            os.environ |= variables
        try:
            answer = run(row, data)
        except BaseException as error:
            said = str(error).strip().splitlines() or [""]
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"skipped": f"{type(error).__name__}: {said[0][:300]} ({Path(last.filename).name}:{last.lineno})"}
            del error
        if torch.cuda.is_available():
            import gc

            gc.collect()
            torch.cuda.empty_cache()
        pipe.send(answer)


class Report:
    """The figures so far, in a file that is written anew after each row."""

    def __init__(self, path: Path | None, about: str) -> None:
        self.path = path
        self.figures: dict[str, Any] = {"schema": 1, "what": about, "environment": environment(), "rows": {}}

    def add(self, row: Row, found: dict[str, Any]) -> None:
        """Keep and print a row."""
        model, train = row.model, row.train
        found["settings"] = {
            "shape": f"{model.n_layer} layers of {model.n_embd}, vocabulary {model.vocab_size}",
            "sequence": model.block_size,
            "microbatch": row.microbatch,
            "microbatches": train.microbatches,
            "bias": model.bias,
            "fp32_residual": model.fp32_residual,
            "precision": train.precision,
            "float8": train.float8,
            "ranks": train.devices,
            "strategy": train.strategy,
            "attention": row.attention,
            "chunks": row.chunks,
            "inductor": row.inductor,
            "dynamo": row.dynamo,
        }
        self.figures["rows"][row.name] = found
        self.write()
        if "skipped" in found:
            print(f"{row.name}: skipped. {found['skipped']}", flush=True)
            return
        mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
        wait = found.get("share_of_time_the_gpu_waits_for_the_host")
        waits = "" if wait is None else f", waits {wait:.2%}"
        print(
            f"{row.name}: {found['tokens_per_second_and_gpu']:,} tokens/s a GPU{mfu}{waits}, "
            f"{found['peak_gigabytes']} GB, first update {found['first_update_s']} s",
            flush=True,
        )

    def write(self) -> None:
        """Write the file."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")


def precompile(rows: list[Row], data: Path, small: bool, processes: int, seconds: float) -> dict[str, str]:
    """Run one update of each row in processes side by side, so that the compiler's caches know the rows' graphs.

    Returns:
        For each row, how long it took beside the others, or why it failed.
    """
    until, waiting, said = time.monotonic() + seconds, list(rows), {}
    running: dict[Any, tuple[Row, float, Workers]] = {}
    with contextlib.ExitStack() as stack:
        idle = [Workers(1, data, small) for _ in range(min(processes, len(rows)))]
        for workers in idle:
            stack.callback(workers.stop)
            workers.start()
        while waiting or running:
            while waiting and idle:
                row, workers = waiting.pop(0), idle.pop()
                workers.start()
                pipe = workers.processes[0][1]
                once = replace(row, updates=1, train=replace(row.train, microbatches=1, updates=1, warmup=0))
                pipe.send(once.small() if small else once)
                running[pipe] = (row, time.monotonic(), workers)
            ready = multiprocessing.connection.wait(list(running), max(0.0, until - time.monotonic()))
            if not ready:
                break
            for answered in ready:
                row, began, workers = running.pop(answered)
                try:
                    answer = workers.processes[0][1].recv()
                except (EOFError, OSError):
                    workers.stop()
                    answer = {"skipped": "the process died"}
                said[row.name] = answer.get("skipped") or f"{time.monotonic() - began:.0f} s"
                idle.append(workers)
    return said | {row.name: "not within the time" for row in (*waiting, *(entry[0] for entry in running.values()))}


def prepared(folder: Path, small: bool) -> Path:
    """The standard library's text in a vocabulary of 32,000; of 512 on a computer without a GPU."""
    from reference.data.prepare import prepare

    return prepare([], "bpe:512" if small else "bpe:32000", folder / "tokens", progress=False).folder


def measure(rows: list[Row], workers: Workers, report: Report, left: Callable[[], float]) -> None:
    """Run rows as long as there is time, and keep each."""
    for row in rows:
        if left() < 15:
            report.add(row, {"skipped": "The time of the whole script was over."})
        else:
            report.add(row, workers.run(row, left()))
