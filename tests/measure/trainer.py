"""What the trainer reaches, and what it costs beside the bare work.

``python -m tests.measure.trainer --write FILE`` on a GPU: tokens/s of whole runs of ``Trainer.fit``, on real tokens,
with metrics written and progress shown, and the share of time in which the GPU waits. Without a GPU: the time of an
update of the preset ``tiny`` over that of the bare forward, backward and step of the same model, in turn, in one
process.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from conformance.report.environment import environment
from reference.cli.loggers import csv_metrics
from reference.cli.presets import PRESETS
from reference.config import GPTConfig, TrainConfig
from reference.data.prepare import prepare
from reference.data.tokens import TokenData
from reference.training.throughput import device_peak, flops_per_token
from reference.training.trainer import Record, Trainer

WARMUP, MEASURED, PROFILED = 3, 6, 1  # updates; the first compile
PAIRS = 100
HOST_GAP = 10.0  # microseconds; a longer gap between two kernels is the host's


def gpu_runs() -> dict[str, tuple[GPTConfig, TrainConfig, int]]:
    """The runs: shape, settings, sequences per microbatch."""
    small = PRESETS["gpt2-124m"]
    updates = WARMUP + MEASURED + PROFILED
    quiet = replace(small.train, updates=updates, evaluate_every=None, save_every=None, warmup=2)
    true = replace(quiet, precision="bf16-true")
    large = replace(true, optimizer_args={"lr": 2e-4, "weight_decay": 0.1})
    wide = GPTConfig.gpt2(n_layer=24, n_head=16, n_embd=2048, bias=False)
    return {
        "124M, bf16-mixed": (small.model, quiet, 64),
        "124M, bf16-mixed, one microbatch per update": (small.model, replace(quiet, microbatches=1), 64),
        "124M, bf16-true": (small.model, true, 64),
        "124M without biases, bf16-true": (replace(small.model, bias=False), true, 64),
        "1.3B in Llama's shape, bf16-true": (GPTConfig.llama(block_size=1024), large, 16),
        "1.3B in GPT-2's shape without biases, bf16-true": (wide, large, 16),
    }


def measure_run(model: GPTConfig, train: TrainConfig, microbatch: int, data: Path) -> dict[str, Any]:
    """One run of ``Trainer.fit`` on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])

    def watch(record: Record) -> None:
        if record.update == WARMUP + MEASURED:
            profiler.start()

    with tempfile.TemporaryDirectory() as folder:
        tokens = TokenData(data, "train", block_size=model.block_size, microbatch_size=microbatch, seed=1)
        torch.cuda.reset_peak_memory_stats()
        result = Trainer(model, train, folder, [csv_metrics(Path(folder)), watch]).fit(tokens)
        torch.cuda.synchronize()
    profiler.stop()
    seconds = [record.seconds for record in result.records[WARMUP : WARMUP + MEASURED]]
    rate = result.records[-1].tokens / statistics.median(seconds)
    peak = device_peak(torch.device("cuda"), train.precision)
    needed = flops_per_token(model, model.block_size)
    return {
        "tokens_per_second": round(rate),
        "mfu": None if peak is None else round(rate * needed / peak, 4),
        "seconds_per_update": [round(value, 4) for value in seconds],
        "tokens_per_update": result.records[-1].tokens,
        **idle_shares(profiler),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "loss": [round(record.loss, 4) for record in result.records],
        "settings": {
            "shape": f"{model.n_layer} layers of {model.n_embd}, vocabulary {model.vocab_size}",
            "sequence": model.block_size,
            "microbatch": microbatch,
            "microbatches": train.microbatches,
            "bias": model.bias,
            "fp32_residual": model.fp32_residual,
            "precision": train.precision,
            "optimizer": train.optimizer,
            "clip": train.clip,
        },
    }


def idle_shares(profiler: Any) -> dict[str, float]:
    """Shares of the time between the first and the last kernel in which none ran.

    Between two kernels that are both queued the device itself needs one to three microseconds. Longer gaps are
    those in which it waits for the host.
    """
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type.name == "CUDA")
    gaps, end = [], spans[0][0]
    for begin, finish in spans:
        gaps.append(max(0.0, begin - end))
        end = max(end, finish)
    whole = end - spans[0][0]
    waits = [gap for gap in gaps if gap > HOST_GAP]
    return {
        "share_of_time_the_gpu_waits_for_the_host": round(sum(waits) / whole, 5),
        "share_of_time_between_queued_kernels": round((sum(gaps) - sum(waits)) / whole, 5),
        "longest_wait_in_microseconds": round(max(gaps), 1),
    }


def on_gpu(only: list[str], write: Callable[[dict[str, Any]], None]) -> None:
    """The runs, on the standard library's text in vocabularies of their sizes; written after each."""
    logging.getLogger("reference").setLevel(logging.INFO)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = {size: prepare([], f"bpe:{size}", Path(folder) / str(size), progress=False) for size in (50257, 32000)}
        for name, (model, train, microbatch) in gpu_runs().items():
            if only and name not in only:
                continue
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            text = texts[max(size for size in texts if size <= model.vocab_size)]
            results[name] = measure_run(model, train, microbatch, text.folder)
            print(name, json.dumps(results[name]), flush=True)
            described = [text.describe().replace(f"{folder}/", "").splitlines() for text in texts.values()]
            write({"text": described, "runs": results})


def on_cpu() -> dict[str, Any]:
    """The ratio of an update by the trainer to the bare work, with the metrics written."""
    preset = PRESETS["tiny"]
    quiet = replace(preset.train, updates=4, evaluate_every=None, save_every=None, warmup=1, accelerator="cpu")
    size, length = preset.data.microbatch_size, preset.model.block_size
    ids = torch.randint(256, (64, size, length + 1), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(preset.model, replace(quiet, updates=10_000), folder).setup()
        write = csv_metrics(Path(folder))
        numbers = itertools.count()
        stream = itertools.cycle(ids)
        state = {"pairs": run.fetch(stream)}

        def trained() -> None:
            update, began = next(numbers), time.perf_counter()
            done = run.update_once(update, state["pairs"], stream)
            state["pairs"] = done.following
            seconds = time.perf_counter() - began
            write(Record(update + 1, done.loss, 1.0, done.gradient_norm, done.tokens, None, seconds))

        bare_run = Trainer(preset.model, quiet, folder).setup()
        model, optimizer = bare_run.module, bare_run.bare

        def bare() -> None:
            batch = next(stream)
            logits = model(batch[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(10):
            trained()
            bare()
        pairs = [(seconds_of(trained), seconds_of(bare)) for _ in range(PAIRS)]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "what": "Trainer's update (batches, clipping, metrics) over forward, backward and step, preset tiny",
        "ratio": {
            "median": round(statistics.median(ratios), 4),
            "quartiles": [ratios[PAIRS // 4], ratios[-PAIRS // 4]],
        },
        "seconds": {"trainer": statistics.median(a for a, _ in pairs), "bare": statistics.median(b for _, b in pairs)},
        "threads": torch.get_num_threads(),
    }


def seconds_of(function: Callable[[], None], times: int = 5) -> float:
    """Wall time of some calls, per call."""
    began = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - began) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a run on the GPU; repeatable")
    arguments = parser.parse_args()

    def write(figures: dict[str, Any]) -> None:
        text = json.dumps({"schema": 1, "environment": environment(), **figures}, indent=2) + "\n"
        if arguments.write:
            arguments.write.write_text(text, encoding="utf-8")
        else:
            print(text, end="")

    if torch.cuda.is_available():
        on_gpu(arguments.only, write)
    else:
        write(on_cpu())


if __name__ == "__main__":
    main()
