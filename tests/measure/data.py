"""What a token file of a gigabyte costs: to write, to open, to read from, and in memory. Linux.

``python -m tests.measure.data --write reports/data-loading.json`` keeps the figures. It needs 1.1 GB in the folder for
temporary files, and removes them.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conformance.report.environment import environment
from reference.data import TokenData, write_tokens
from reference.data.prepare import prepare

GIGABYTE = 10**9
BLOCK_SIZE, MICROBATCH_SIZE, BATCHES = 1024, 8, 1000
PROCESSES = 5
FAR = 10**9  # a microbatch number in the thousands of epochs


def documents(tokens: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint16]]]:
    """Random ids below 50256, in documents of 10,000."""
    generator = np.random.default_rng(0)
    for _ in range(tokens // 10_001):
        yield generator.integers(0, 50256, 10_000, dtype=np.uint16)


def resident() -> dict[str, int]:
    """Bytes of memory of this process: its own, and pages of files, which the system takes back when it needs them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Take the folder's files out of the page cache, so that the disk is read."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(folder: Path) -> dict[str, float]:
    """The figures of one process, which has read nothing before."""

    def opened() -> TokenData:
        return TokenData(
            folder, "train", block_size=BLOCK_SIZE, microbatch_size=MICROBATCH_SIZE, seed=np.random.randint(1 << 30)
        )

    before = resident()
    figures = {"open_cold_s": seconds(opened)}
    data = opened()
    figures["first_batch_cold_s"] = seconds(lambda: next(data.batches_from(0)))
    figures["open_s"] = seconds(opened)
    list(itertools.islice(data.batches_from(0), 10))  # imports and first calls
    figures["first_batch_s"] = seconds(lambda: next(data.batches_from(0)))
    figures[f"first_batch_from_{FAR:.0e}_s"] = seconds(lambda: next(data.batches_from(FAR)))
    started = resident()
    figures["own_memory_opened_bytes"] = started["RssAnon"] - before["RssAnon"]
    for name in ("batch_cold_s", "batch_s"):
        figures[name] = seconds(lambda: list(map(len, itertools.islice(data.batches_from(1), BATCHES)))) / BATCHES
    figures[f"own_memory_after_{BATCHES}_batches_bytes"] = resident()["RssAnon"] - before["RssAnon"]
    figures[f"file_pages_after_{BATCHES}_batches_bytes"] = resident()["RssFile"] - before["RssFile"]
    return figures


def measure(folder: Path) -> dict[str, Any]:
    """Write the file, read it in processes of their own, and remove it."""
    tokens = GIGABYTE // 2
    writing = seconds(
        lambda: write_tokens(
            folder, "train", documents(tokens), vocab_size=50257, tokenizer="random", end_of_document=50256
        )
    )
    forget(folder)
    runs: list[dict[str, float]] = []
    for _ in range(PROCESSES):
        command = [sys.executable, "-m", "tests.measure.data", "--read", str(folder)]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        forget(folder)
    data = TokenData(folder, "train", block_size=64, microbatch_size=1, seed=0)
    table = seconds(lambda: np.random.default_rng(0).permutation(data.sequences))
    return {
        "file_bytes": (folder / "train.bin").stat().st_size,
        "write_s": round(writing, 2),
        "verify_s": round(seconds(data.verify), 2),
        "batch": [MICROBATCH_SIZE, BLOCK_SIZE + 1],
        "processes": PROCESSES,
        "median": {name: float(f"{statistics.median(run[name] for run in runs):.3g}") for name in runs[0]},
        "worst": {name: float(f"{max(run[name] for run in runs):.3g}") for name in runs[0]},
        "not_taken: the order as a table, block_size 64": {"bytes": data.sequences * 8, "s": round(table, 2)},
    }


def measure_preparation(folder: Path) -> dict[str, Any]:
    """The standard library, as bytes and as byte pairs."""
    figures: dict[str, Any] = {}
    for tokenizer in ("bytes", "bpe:4096"):
        out = folder / tokenizer.replace(":", "-")
        started = time.perf_counter()
        prepared = prepare([], tokenizer, out, progress=False)
        figures[tokenizer] = {
            "s": round(time.perf_counter() - started, 2),
            "files": prepared.files,
            "text_bytes": prepared.size,
            "tokens": prepared.tokens,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read)))
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if shutil.disk_usage(folder).free < 3 * GIGABYTE:
            raise SystemExit(f"{folder} has less than 3 GB free: set TMPDIR to another disk.")
        result = {
            "what": "a token file of 1 GB (16 bits, random ids) and the standard library's sources as text",
            "token_file": measure(folder),
            "standard_library": measure_preparation(folder),
            "environment": environment(),
        }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
