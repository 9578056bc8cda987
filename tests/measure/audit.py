"""What an audit costs: time of an update while it is recorded and afterwards, and memory, beside the same run alone.

``python -m tests.measure.audit --write reports/audit-overhead.json`` runs where it is started, on a GPU or the CPU.
Each case runs in one process: updates alone, recorded ones, and those after the audit has gone, in turn.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch import nn

import conformance
from conformance.auditing.traces import save
from conformance.report.environment import environment
from reference import GPT, GPTConfig

SHAPES = {
    "tiny": GPTConfig.gpt2(vocab_size=512, block_size=64, n_layer=2, n_head=2, n_embd=64),
    "27M": GPTConfig.gpt2(vocab_size=32768, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "124M": GPTConfig.gpt2(vocab_size=50304, block_size=1024),
    "1.3B": GPTConfig.llama(vocab_size=32000, block_size=2048, n_layer=24, n_head=16, n_kv_head=16, n_embd=2048),
}
ALONE, RECORDED, AFTER = 12, 8, 12


class Loop:
    """A loop as in nanoGPT's train.py: autocast, accumulation, clipping, AdamW."""

    def __init__(self, case: dict[str, Any], device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        config = SHAPES[case["model"]]
        dtype = torch.bfloat16 if case["precision"] == "bf16-true" else torch.float32
        model = GPT(config).to(device=device, dtype=dtype)
        self.raw = model
        self.config = config
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device == "cuda" or None)
        self.model: Any = torch.compile(model) if case["compile"] else model

    def update(self) -> float:
        """Run one update and return its wall time in seconds."""
        case, started = self.case, time.perf_counter()
        shape = case["rows"], self.config.block_size + 1
        for _ in range(case["microbatches"]):
            batch = torch.randint(self.config.vocab_size, shape, device=self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=case["precision"] == "bf16-mixed"):
                logits = self.model(batch[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            (loss / case["microbatches"]).backward()
        nn.utils.clip_grad_norm_(self.raw.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def compilations() -> int:
    """Return how many graphs torch.compile has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def peak(device: str) -> int:
    """Return the largest memory that was allocated on the GPU since the last call."""
    if device != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def measure(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the figures of one case."""
    loop = Loop(case, device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loop.raw.parameters())
    for _ in range(3):
        loop.update()
    before, _ = compilations(), peak(device)
    alone = [loop.update() for _ in range(ALONE)]
    memory_alone = peak(device)
    recorded: list[float] = []
    after: list[float] = []
    memory = [0]

    def run(seconds: list[float], count: int) -> None:
        seconds += [loop.update() for _ in range(count)]

    with audited() as verdict:
        run(recorded, RECORDED)
        memory[0] = peak(device)
        ending = loop.update()  # the audit ends as this one begins: it judges, and runs the model itself
        run(after, AFTER)
    again = [loop.update() for _ in range(ALONE)]
    base = statistics.median([*alone, *again])
    with tempfile.TemporaryDirectory() as folder:
        assert verdict.facts is not None, verdict.broken
        record = save(verdict.facts, Path(folder)).stat().st_size
    return {
        **case,
        "device": device,
        "weights_bytes": weights,
        "seconds_alone": round(base, 5),
        "recorded_to_alone": round(statistics.median(recorded[1:]) / base, 4),
        "first_recorded_to_alone": round(recorded[0] / base, 4),
        "after_to_alone": round(statistics.median(after) / base, 4),
        "again_to_alone": round(statistics.median(again) / statistics.median(alone), 4),
        "ending_seconds": round(ending, 3),
        "memory_above_alone_bytes": max(memory[0] - memory_alone, 0) if device == "cuda" else None,
        "record_bytes_per_update": record // RECORDED,
        "graphs_made_beside_the_run": compilations() - before,
        "faults": [finding.rule for finding in verdict.faults],
        "not_looked_at": [finding.rule for finding in verdict.of("not looked at")],
        "broken": verdict.broken,
    }


def audited() -> contextlib.AbstractContextManager[Any]:
    """Return an audit that lets the run go on."""
    return conformance.audit(updates=RECORDED, then="go-on")


def cases(device: str) -> list[dict[str, Any]]:
    """Return what to measure on a device."""

    def case(model: str, rows: int, microbatches: int, precision: str, compiled: bool) -> dict[str, Any]:
        names = ("model", "rows", "microbatches", "precision", "compile")
        return dict(zip(names, (model, rows, microbatches, precision, compiled), strict=True))

    if device == "cuda":
        return [
            case("124M", 32, 4, "bf16-mixed", True),
            case("124M", 32, 1, "bf16-mixed", True),
            case("124M", 16, 4, "bf16-mixed", False),
            case("1.3B", 8, 4, "bf16-true", True),
        ]
    return [case("27M", 8, 2, "32-true", False)]


def main(arguments: list[str] | None = None, device: str = "cuda" if torch.cuda.is_available() else "cpu") -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="one tiny case, to see that all lines run")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = cases(device)
    if options.tiny:
        chosen = [{**chosen[0], "model": "tiny", "rows": 4, "compile": False}]
    for case in chosen:
        try:
            rows.append(measure(case, device))
        except Exception as error:  # one case that fails costs no other
            rows.append({**case, "error": f"{type(error).__name__}: {error}"})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if options.write:
            content = {"what": __doc__.splitlines()[0], "rows": rows, "environment": environment()}
            options.write.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
