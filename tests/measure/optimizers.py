"""Which optimizers the trainer trains with, and whether a run that is interrupted goes on bit for bit.

``python -m tests.measure.optimizers --write FILE``: one row for each class, of torch and of the libraries that are
installed, in 32-true and in bf16-true. docs/trainer.md shows the rows. What torch.compile would compile stays eager.
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import json
import logging
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference.cli.boundary import explain
from reference.cli.settings import Settings
from reference.config import DataConfig, GPTConfig, TrainConfig
from reference.errors import ExplainedError, first_line
from reference.training.trainer import FitResult, Trainer

MODEL = GPTConfig.gpt2(vocab_size=128, block_size=16, n_layer=1, n_head=2, n_embd=64)  # large enough for 8-bit state
UPDATES, CUT = 8, 4
PRECISIONS = ("32-true", "bf16-true")
TORCH = "torch.optim"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "torch.optim.Adadelta": {"lr": 5.0},
    "torch.optim.RMSprop": {"lr": 1e-3},
    "torch.optim.SGD": {"lr": 0.3, "momentum": 0.9},
    "torch.optim.ASGD": {"lr": 0.5},
    "torch.optim.Adafactor": {"lr": 0.05},
    "torch.optim.Muon": {"lr": 0.02},
    "bitsandbytes.optim.RMSprop8bit": {"lr": 1e-3},
    "bitsandbytes.optim.SGD8bit": {"lr": 0.3, "momentum": 0.9},
    "bitsandbytes.optim.LARS8bit": {"lr": 1.0, "momentum": 0.9},
    "bitsandbytes.optim.Lion8bit": {"lr": 2e-3},
    "bitsandbytes.optim.PagedLion8bit": {"lr": 2e-3},
    "bitsandbytes.optim.Lion": {"lr": 2e-3},
    "lion_pytorch.Lion": {"lr": 2e-3},
    "optimi.Lion": {"lr": 2e-3},
    "optimi.SGD": {"lr": 0.3, "momentum": 0.9},
    "pytorch_optimizer.Lion": {"lr": 2e-3},
    "pytorch_optimizer.Prodigy": {"lr": 1.0},
    "schedulefree.SGDScheduleFree": {"lr": 1.0},
    "schedulefree.AdamWScheduleFree": {"lr": 2e-2},
    "schedulefree.RAdamScheduleFree": {"lr": 2e-2},
    "transformers.Adafactor": {"lr": 1e-2, "relative_step": False},
}
"""What a class is tried with; others with {"lr": 5e-3}."""
LIBRARIES: dict[str, tuple[str, ...]] = {
    "bitsandbytes": (
        *(f"bitsandbytes.optim.{name}8bit" for name in ("AdamW", "Adam", "Lion", "RMSprop", "SGD", "Adagrad", "LAMB")),
        *(f"bitsandbytes.optim.{name}8bit" for name in ("LARS", "AdEMAMix", "PagedAdamW", "PagedLion")),
        *("bitsandbytes.optim.AdamW", "bitsandbytes.optim.Lion"),
    ),
    "grokadamw": ("grokadamw.GrokAdamW",),
    "reference": ("reference.optimizers.adamw8bit.AdamW8bit", "reference.optimizers.grokadamw.GrokAdamW"),
    "schedulefree": tuple(f"schedulefree.{name}ScheduleFree" for name in ("AdamW", "RAdam", "SGD")),
    "lion-pytorch": ("lion_pytorch.Lion",),
    "torch-optimi": tuple(
        f"optimi.{name}" for name in ("AdamW", "Adan", "Lion", "RAdam", "Ranger", "SGD", "StableAdamW")
    ),
    "torchao": tuple(f"torchao.optim.{name}" for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
    "pytorch-optimizer": tuple(
        f"pytorch_optimizer.{name}"
        for name in ("SOAP", "AdaFactor", "Lion", "CAME", "Prodigy", "ADOPT", "MARS", "Muon", "ScheduleFreeAdamW")
    ),
    "transformers": ("transformers.Adafactor",),
}
"""Classes of libraries, by the name of the package; those of torch.optim are found."""


@dataclass
class Seen:
    """What one class did in one precision."""

    trains: bool = False
    """The loss of the batch that is trained on fell, and every tensor moved; under bf16-true, all but the gains
    of norms, which start at 1: their updates are often lost to rounding."""
    resumes: bool | None = None
    """Weights and state of a resumed run are those of a run that was not interrupted, bit for bit."""
    state_bytes: float | None = None
    """Of the optimizer's state, per trained parameter."""
    refused: str = ""
    """The sentence that ended the run."""
    still: list[str] = field(default_factory=list)
    """Names of tensors that did not move."""
    losses: list[float] = field(default_factory=list)
    """Of the first and the last update."""


def of_torch() -> list[str]:
    """Return the class path of every optimizer of torch.optim."""
    found = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and name != "Optimizer"]
    return [f"{TORCH}.{name}" for name in sorted(found)]


def settings_of(path: str, precision: str, **changes: Any) -> TrainConfig:
    """Return the run in which a class is tried."""
    values: dict[str, Any] = {"updates": UPDATES, "schedule": "constant", "accelerator": "cpu", "clip": 1.0, "seed": 7}
    values |= {"optimizer": path, "optimizer_args": ARGUMENTS.get(path, {"lr": 5e-3}), "precision": precision}
    return TrainConfig(**values | {"save_every": CUT, "evaluate_every": 3} | changes)


def batches() -> list[Tensor]:
    """Return the batches of a run: two in turn."""
    drawn = torch.Generator().manual_seed(3)
    return list(torch.randint(MODEL.vocab_size, (2, 4, MODEL.block_size + 1), generator=drawn))


def fit(config: TrainConfig, folder: Path, resume: Any = False) -> FitResult:
    """Train, or go on."""
    data = batches()
    return Trainer(MODEL, config, folder).fit(data, data, resume=resume)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a state, however deep."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for one in values for tensor in tensors_in(one)]


def plain_tensors(tensor: Any) -> list[Tensor]:
    """Return the tensors that a tensor of torchao is made of; another one as it is."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain_tensors(getattr(tensor, name))]


def state_tensors(result: FitResult) -> list[Tensor]:
    """Return all plain tensors of an optimizer's state, and of its groups."""
    entries = [result.optimizer.state.get(p, {}) for g in result.optimizer.param_groups for p in g["params"]]
    groups = [group["state"] for group in result.optimizer.param_groups if "state" in group]  # grokadamw's own place
    return [part for tensor in tensors_in([entries, groups]) for part in plain_tensors(tensor)]


def weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a model."""
    return [parameter.detach() for parameter in model.parameters()]


def coarse(tensor: Tensor) -> bool:
    """Return whether updates of a tensor may be lost to rounding: a vector in 16 bits that does not start at 0."""
    return tensor.ndim < 2 and tensor.dtype != torch.float32 and bool(tensor.any())


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether two lists of tensors have the same bits."""
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and same


def tried(path: str, precision: str, folder: Path, **changes: Any) -> Seen:
    """Return what a class does: train, be interrupted at an update, and go on."""
    config = settings_of(path, precision, **changes)
    with torch.compiler.set_stance("force_eager"):
        try:
            start = Trainer(MODEL, config).setup()
            before = {name: tensor.detach().clone() for name, tensor in start.module.named_parameters()}
            whole = fit(config, folder / "whole")
        except ExplainedError as error:
            return Seen(refused=first_line(error))
        except Exception as error:  # a class may raise anything; the command line explains it
            told = explain(error, Settings("", MODEL, config, DataConfig(), ""))
            return Seen(refused=first_line(told or error))
        after, losses = weights(whole.model), [whole.records[0].loss, whole.records[-2].loss]
        pairs = zip(before.items(), after, strict=True)
        changed = [(name, bool((a != b).float().mean() > 0.2)) for (name, a), b in pairs if not coarse(a)]
        still = [name for name, moved in changed if not moved]
        size = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(whole))
        trains = not still and losses[1] < losses[0]
        seen = Seen(trains, None, size / sum(t.numel() for t in after), "", still, losses)
        resumed = fit(config, folder / "cut", resume=folder / "whole" / f"step-{CUT:08d}")
    alike = equal(after, weights(resumed.model)) and equal(state_tensors(whole), state_tensors(resumed))
    seen.resumes = alike and whole.records[CUT:] == resumed.records
    return seen


def main() -> None:
    """Try all classes that are installed, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, help="JSON file for the rows")
    parser.add_argument("--only", default="", help="only classes with this in their path; nothing is written")
    arguments = parser.parse_args()
    logging.getLogger("reference").setLevel("ERROR")
    logging.getLogger("lightning").setLevel("ERROR")
    warnings.simplefilter("ignore")
    versions = {"torch": str(torch.__version__)}
    rows: dict[str, dict[str, Any]] = {}
    found = {"torch": tuple(of_torch())} | LIBRARIES
    for package, paths in found.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
        for path in paths:
            if arguments.only not in path or package not in (*versions, "reference"):
                continue
            rows[path] = {}
            for precision in PRECISIONS:
                with tempfile.TemporaryDirectory() as folder:
                    rows[path][precision] = vars(tried(path, precision, Path(folder)))
                print(path, precision, rows[path][precision], flush=True)
    if not arguments.only:
        arguments.write.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
