"""What an audit costs beside whole trainers: the reference, LitGPT's pretraining, transformers' Trainer. On a GPU.

``python -m tests.measure.audit_stacks --write FILE`` trains GPT-2 124M with each, compiled, in bf16-mixed, once alone
once under an audit that lets the run go on, and once alone again, which shows how far two runs of one trainer differ.
The time of an update is from step to step, with the GPU done.
"""

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import conformance
from conformance.report.environment import environment

RECORDED, UPDATES, WARMUP, MICROBATCHES = 8, 24, 4, 4
ON_GPU = torch.cuda.is_available()
ROWS, LENGTH, VOCABULARY = (32, 1024, 50304) if ON_GPU else (2, 32, 512)
ALL = ROWS * MICROBATCHES * UPDATES
SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768} if ON_GPU else {"n_layer": 2, "n_head": 2, "n_embd": 32}


def tokens(rows: int) -> torch.Tensor:
    """Return random ids of this many sequences, with one more for the last target."""
    return torch.randint(VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def reference(folder: str) -> None:
    """Train with the reference."""
    from reference import GPTConfig, TrainConfig, Trainer

    model = GPTConfig.gpt2(vocab_size=VOCABULARY, block_size=LENGTH, **SHAPE)
    train = TrainConfig(updates=UPDATES, microbatches=MICROBATCHES, precision="bf16-mixed", compile=ON_GPU)
    batches = tokens(ALL).split(ROWS)
    Trainer(model, train, folder).fit([(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in batches])


def litgpt(folder: str) -> None:
    """Train by litgpt.pretrain, which always compiles."""
    from litgpt import pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data import DataModule
    from torch.utils.data import DataLoader

    config = Config.from_name("pythia-160m", block_size=LENGTH, padded_vocab_size=VOCABULARY, vocab_size=VOCABULARY)
    if not ON_GPU:
        small = {"n_query_groups": None, "head_size": None, "intermediate_size": 96, **SHAPE}
        config = Config.from_name("pythia-14m", block_size=LENGTH, padded_vocab_size=512, vocab_size=512, **small)
    data: Any = DataModule()
    data.connect = lambda **_: None
    samples: Any = tokens(ALL)
    data.train_dataloader = data.val_dataloader = lambda: DataLoader(samples, ROWS)
    batch = ROWS * MICROBATCHES
    train = TrainArgs(global_batch_size=batch, micro_batch_size=ROWS, max_tokens=UPDATES * batch * LENGTH)
    train.lr_warmup_steps, train.save_interval, train.max_norm, train.tie_embeddings = 2, None, 1.0, False
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}}
    options: dict[str, Any] = {"precision": "bf16-mixed" if ON_GPU else "32-true", "optimizer": optimizer, "devices": 1}
    options |= {"data": data, "train": train, "eval": EvalArgs(10**9, max_iters=1, initial_validation=False)}
    with patch.object(sys, "argv", ["litgpt", "pretrain", "pythia-160m"]):
        pretrain.setup("pythia-160m", config, Path(folder), logger_name="csv", **options)


def transformers(folder: str) -> None:
    """Train with transformers' Trainer."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    sizes = {**SHAPE, "vocab_size": VOCABULARY, "n_positions": LENGTH, "bos_token_id": 0, "eos_token_id": 0}
    rows = [{"input_ids": row, "labels": row} for row in tokens(ALL)[:, :-1]]
    steps = {"max_steps": UPDATES, "gradient_accumulation_steps": MICROBATCHES, "per_device_train_batch_size": ROWS}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": not ON_GPU}
    options = TrainingArguments(folder, **steps, **quiet, bf16=ON_GPU, torch_compile=ON_GPU, logging_steps=1000)
    Trainer(GPT2LMHeadModel(GPT2Config(**sizes)), options, train_dataset=rows).train()


STACKS: dict[str, Callable[[str], None]] = {"reference": reference, "LitGPT": litgpt, "transformers": transformers}


@contextlib.contextmanager
def timed() -> Iterator[list[float]]:
    """Give the list of the times of updates, from the end of one step to that of the next."""
    ends: list[float] = []
    seconds: list[float] = []

    def stepped(*_: Any) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        seconds[:] = [after - before for before, after in itertools.pairwise(ends)]

    handle = register_optimizer_step_post_hook(stepped)
    try:
        yield seconds
    finally:
        handle.remove()


def measure(name: str) -> dict[str, Any]:
    """Return the figures of one stack."""

    def peak() -> int:
        gc.collect()  # a model in a circle of references would count for the next run
        found = torch.cuda.max_memory_allocated() if ON_GPU else 0
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        return found

    def alone() -> float:
        with tempfile.TemporaryDirectory() as folder, timed() as seconds:
            STACKS[name](folder)
        return statistics.median(seconds[WARMUP:])

    before, memory = alone(), peak()
    audit = conformance.audit(updates=RECORDED, then="go-on")
    with tempfile.TemporaryDirectory() as folder, timed() as seconds, audit as verdict:
        STACKS[name](folder)
    above = max(peak() - memory, 0)
    again = alone()
    base = (before + again) / 2
    recorded, after = seconds[WARMUP : RECORDED - 1], seconds[RECORDED + 1 :]
    return {
        "stack": name,
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "seconds_alone": round(base, 5),
        "alone_again_to_alone": round(again / before, 4),
        "recorded_to_alone": round(statistics.median(recorded) / base, 4),
        "after_to_alone": round(statistics.median(after) / base, 4),
        "memory_above_alone_bytes": above,
        "faults": [finding.rule for finding in verdict.faults],
        "not_looked_at": [finding.rule for finding in verdict.of("not looked at")],
        "broken": verdict.broken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--only", choices=STACKS, action="append")
    options = parser.parse_args()
    rows = []
    for name in options.only or STACKS:
        try:
            rows.append(measure(name))
        except Exception as error:  # a stack that is not installed costs no other
            rows.append({"stack": name, "error": f"{type(error).__name__}: {error}"})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if options.write:
            content = {"what": (__doc__ or "").splitlines()[0], "rows": rows, "environment": environment()}
            options.write.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
