"""FSDP and compiled replicas on two GPUs against one: the start, the losses, and checkpoints read both ways.

``python -m tests.measure.fsdp --write FILE`` runs on a machine with two GPUs and keeps what it saw, with versions.
Exit code 1 if a promise is broken. It starts torchrun for the two ranks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conformance.report.environment import environment
from reference.checkpoint.folder import load_weights, step_folder
from reference.config import GPTConfig, TrainConfig
from reference.data import TokenData, write_tokens
from reference.model.gpt import GPT
from reference.training.saving import save
from reference.training.trainer import Trainer

MODELS = {
    "gpt2-tied": GPTConfig.gpt2(vocab_size=512, block_size=64, n_layer=4, n_head=4, n_embd=128),
    "llama-untied": GPTConfig.llama(vocab_size=512, block_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=128),
}
UPDATES, HALF = 20, 10
ONE = TrainConfig(
    updates=UPDATES,
    microbatches=2,
    optimizer_args={"lr": 1e-3, "weight_decay": 0.1},
    warmup=2,
    accelerator="cuda",
    evaluate_every=HALF,
    save_every=HALF,
)
TWO = replace(ONE, microbatches=1, devices=2, strategy="fsdp")
REPLICAS = replace(TWO, strategy="ddp", compile=True, save_every=None)
BOUND = 1e-3  # relative, of a loss: what is promised. Seen on two H200: 1.6e-7


def run(name: str, config: TrainConfig, folder: Path, directory: Path, resume: Path | None) -> dict[str, Any]:
    """One run: its losses, and whether the start was bit-equal to a GPT built on one device."""
    split = {"block_size": 64, "microbatch_size": 4, "seed": 7}
    train, validation = (TokenData(folder, part, **split) for part in ("train", "validation"))
    result = Trainer(MODELS[name], config, directory).fit(train, validation, resume or False)
    return {
        "losses": [record.loss for record in result.records],
        "norms": [record.gradient_norm for record in result.records],
        "validation": [r.validation_loss for r in result.records if r.validation_loss is not None],
    }


def start_differs(name: str, directory: Path) -> list[str]:
    """Names of the weights of a sharded start that are not bit-equal to those of one device."""
    run = Trainer(MODELS[name], TWO, directory).setup()
    save(run, 0, None)
    if run.fabric.global_rank:
        return []
    expected = GPT(MODELS[name], TWO.seed).state_dict()
    seen = load_weights(step_folder(directory, 0))
    return [key for key, tensor in expected.items() if not torch.equal(tensor, seen[key])]


def on_ranks(folder: Path, out: Path) -> None:
    """What each of the two ranks does."""
    seen: dict[str, Any] = {}
    for name in MODELS:
        base = out / name
        seen[name] = {
            "start_differs": start_differs(name, base / "start"),
            "whole": run(name, TWO, folder, base / "two", None),
            "compiled": run(name, replace(TWO, compile=True, save_every=HALF), folder, base / "two-compiled", None),
            "replicas": run(name, REPLICAS, folder, base / "two-replicas", None),
            "resumed_from_one": run(name, TWO, folder, base / "two-resumed", step_folder(base / "one", HALF)),
            "resumed_from_two": run(name, TWO, folder, base / "two-again", step_folder(base / "two", HALF)),
        }
    if torch.distributed.get_rank() == 0:
        (out / "ranks.json").write_text(json.dumps(seen), encoding="utf-8")
    torch.distributed.destroy_process_group()


def deviation(seen: list[float], expected: list[float]) -> float:
    """The largest relative difference of two loss traces of the same length."""
    return max(abs(s - e) / e for s, e in zip(seen, expected, strict=True))


def compare(out: Path, folder: Path) -> dict[str, Any]:
    """All runs, and how far they are apart."""
    alone = {name: run(name, ONE, folder, out / name / "one", None) for name in MODELS}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "tests.measure.fsdp"]
    subprocess.run([*command, "--ranks", str(folder), str(out)], check=True)
    ranks = json.loads((out / "ranks.json").read_text(encoding="utf-8"))
    result = {}
    for name in MODELS:
        one, two = alone[name], ranks[name]
        resumed = run(name, ONE, folder, out / name / "one-resumed", step_folder(out / name / "two", HALF))
        later, of_two = one["losses"][HALF:], two["whole"]["losses"]
        result[name] = {
            "start: tensors that are not bit-equal": two["start_differs"],
            "losses of 20 updates": deviation(of_two, one["losses"]),
            "gradient norms of 20 updates": deviation(two["whole"]["norms"], one["norms"]),
            "validation losses": deviation(two["whole"]["validation"], one["validation"]),
            "losses, compiled": deviation(two["compiled"]["losses"], one["losses"]),
            "losses, compiled replicas": deviation(two["replicas"]["losses"], one["losses"]),
            "one device resumes from two": deviation(resumed["losses"], of_two[HALF:]),
            "two resume from one device": deviation(two["resumed_from_one"]["losses"], later),
            "two resume from two": deviation(two["resumed_from_two"]["losses"], of_two[HALF:]),
            "losses": {"one device": one["losses"], "two": of_two},
        }
    return result


def broken(result: dict[str, Any]) -> list[str]:
    """The promises that do not hold."""
    return [
        f"{name}: {what} is {value}"
        for name, figures in result.items()
        for what, value in figures.items()
        if (isinstance(value, list) and value) or (isinstance(value, float) and not value < BOUND)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep what was seen as JSON")
    parser.add_argument("--ranks", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks:
        on_ranks(*arguments.ranks)
        return 0
    if torch.cuda.device_count() < 2:
        print(f"Two GPUs are needed, but there are {torch.cuda.device_count()}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        out, folder = Path(temporary) / "out", Path(temporary) / "tokens"
        ids = torch.randint(511, (20_000,), generator=torch.Generator().manual_seed(0))
        ids[1:] = torch.where(torch.rand(19_999) < 0.7, (ids[:-1] * 5 + 1) % 511, ids[1:])  # something to learn
        settings: dict[str, Any] = {"vocab_size": 512, "tokenizer": "bytes", "end_of_document": 511}
        write_tokens(folder, "train", [ids[:18_000].tolist()], **settings)
        write_tokens(folder, "validation", [ids[18_000:].tolist()], **settings)
        result = compare(out, folder)
    wrong = broken(result)
    report = {"schema": 1, "environment": environment(), "gpus": torch.cuda.device_count(), "models": result}
    print(json.dumps(result, indent=2))
    if arguments.write:
        arguments.write.write_text(json.dumps(report | {"broken": wrong}, indent=2) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
