"""A run of any configuration, interrupted in any way and resumed, is bit-equal to one that was never interrupted.

test_resume.py tries every update of a few configurations; here configurations and interruptions are drawn, by a seed.
"""

import contextlib
import math
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reference import files
from reference.config import GPTConfig, TrainConfig
from reference.data import TokenData, write_tokens
from reference.training.trainer import FitResult, Record, Trainer
from tests.reference.test_averages import FREE
from tests.reference.test_resume import PowerCut, differences, end_of

CASES, MORE = 12, 300
pytestmark = pytest.mark.filterwarnings(
    # grokadamw 0.1.2 opens torch.cuda.amp.autocast at every step: deprecated, and off without a GPU.
    "ignore:.*torch.cuda.amp.autocast:FutureWarning",
    "ignore:CUDA is not available",
    # torch says that RMSNorm of 16-bit activations and float32 weights is not fused on the CPU.
    "ignore:.*Mismatch dtype between input and weight:UserWarning",
)
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("torch.optim.AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("torch.optim.AdamW", {"lr": 0.01, "amsgrad": True, "fused": False}),
    ("torch.optim.AdamW", {"lr": 0.01, "foreach": True}),
    ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("torch.optim.SGD", {"lr": 0.1}),
    ("torch.optim.NAdam", {"lr": 0.01}),
    ("torch.optim.RAdam", {"lr": 0.01}),
    ("torch.optim.Adagrad", {"lr": 0.05}),
    ("torch.optim.Adafactor", {"lr": 0.01}),
    ("torch.optim.RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True}),
    ("torch.optim.Adamax", {"lr": 0.01}),
    ("torch.optim.Rprop", {"lr": 0.001}),
    ("torch.optim.ASGD", {"lr": 0.1, "t0": 2}),
    ("bitsandbytes.optim.AdamW8bit", {"lr": 0.01}),
    ("bitsandbytes.optim.Lion", {"lr": 0.001}),
    ("grokadamw.GrokAdamW", {"lr": 0.01}),
    ("torch.optim.Muon", {"lr": 0.02}),
    ("torch.optim.Muon", {"lr": 0.001, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}),
    (FREE["optimizer"], FREE["optimizer_args"]),
]
RESTS: list[tuple[str | None, dict[str, Any]]] = [
    (None, {"lr": 0.01}),
    ("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
    (FREE["optimizer"], FREE["optimizer_args"]),
]
"""What trains the rest of the tensors beside Muon."""
INTERRUPTIONS = ["exception", "SIGINT", "SIGTERM", "SIGHUP", "while saving"]


@dataclass(frozen=True)
class Case:
    """A configuration, and where and how its run is interrupted."""

    model: GPTConfig
    train: dict[str, Any]
    rows: int
    tokens: int
    cuts: tuple[tuple[int, str], ...]
    """After which updates, and by what: an exception, a signal, or one while the next checkpoint is written."""


def drawn(seed: int) -> Case:
    """Draw a case."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 4])
    shape: dict[str, Any] = {
        "vocab_size": 257,
        "block_size": draw.choice([3, 7, 8]),
        "n_layer": draw.choice([1, 2]),
        "n_head": heads,
        "n_kv_head": draw.choice([None, 1]),
        "n_embd": heads * draw.choice([8, 16]),
        "tie_embeddings": draw.random() < 0.5,
        "dropout": draw.choice([0.0, 0.1, 0.5]),
        "fp32_residual": draw.random() < 0.5,
    }
    kind = draw.choice([GPTConfig.gpt2, GPTConfig.llama])
    updates = draw.randint(3, 8)
    warmup = draw.randint(0, updates)
    schedule = draw.choice(["cosine", "wsd", "constant"])
    path, arguments = draw.choice(OPTIMIZERS)
    rest, rest_arguments = draw.choice(RESTS) if path == "torch.optim.Muon" else (None, {})
    train = {
        "updates": updates,
        "microbatches": draw.randint(1, 3),
        "optimizer": path,
        "optimizer_args": arguments,
        "optimizer_rest": rest,
        "optimizer_rest_args": rest_arguments,
        "warmup": warmup,
        "schedule": schedule,
        "min_lr": draw.choice([None, 0.0]),
        "clip": draw.choice([None, 0.5, 1e-3]),
        "decay": draw.choice(["role", "ndim", "all"]),
        "precision": draw.choice(["32-true", "bf16-mixed", "bf16-true"]),
        "stable_embedding": path.startswith("bitsandbytes") and draw.random() < 0.5,
        "activation_checkpointing": draw.random() < 0.3,
        "initialization": draw.choice(["eager", "meta"]),
        "logits": draw.choice(["float32", "compute"]),
        "evaluate_every": draw.choice([None, 1, 2]),
        "evaluate_batches": draw.choice([None, 1]),
        "save_every": draw.randint(1, 3),
        "keep_last": draw.choice([None, 1, 2]),
        "seed": draw.randint(0, 1000),
        "accelerator": "cpu",
    }
    places = sorted(draw.sample(range(1, updates), k=min(draw.randint(1, 3), updates - 1)))
    cuts = tuple((place, draw.choice(INTERRUPTIONS)) for place in places)
    return Case(kind(**shape), train, draw.randint(1, 3), draw.randint(60, 400), cuts)


def ending(update: int, how: str, patch: pytest.MonkeyPatch) -> Callable[[Record], None]:
    """A callback that interrupts a run after an update."""

    def end(record: Record) -> None:
        if record.update == update:
            if how == "exception":
                raise PowerCut
            if how == "while saving":
                patch.setattr(files, "replace_folder", cut)
                return
            signal.raise_signal(signal.Signals[how])

    return end


def cut(new: Path, folder: Path) -> None:
    """In place of giving a written checkpoint its name."""
    raise PowerCut


def difference(case: Case, folder: Path) -> str:
    """Where the interrupted run differs from the one that was not; empty if nowhere."""
    rng = random.Random(case.tokens)
    for split, tokens in (("train", case.tokens), ("validation", 40)):
        ids = [rng.randrange(256) for _ in range(tokens)]
        write_tokens(folder / "data", split, [ids], vocab_size=257, tokenizer="bytes", end_of_document=256)
    sizes = {"block_size": case.model.block_size, "microbatch_size": case.rows, "seed": case.train["seed"]}

    def fit(name: str, *callbacks: Any, resume: Any = False) -> FitResult:
        train, validation = (TokenData(folder / "data", split, **sizes) for split in ("train", "validation"))
        trainer = Trainer(case.model, TrainConfig(**case.train), folder / name, callbacks)
        return trainer.fit(train, validation, resume)

    whole = fit("whole")
    done: list[Record] = []
    for update, how in case.cuts:
        kept: list[Record] = []
        with contextlib.suppress(PowerCut), pytest.MonkeyPatch.context() as patch:
            fit("cut", kept.append, ending(update, how, patch), resume="auto")
        done = [record for record in done if not kept or record.update < kept[0].update] + kept
    resumed = fit("cut", resume="auto")
    first = resumed.records[0].update if resumed.records else math.inf
    done = [record for record in done if record.update < first] + resumed.records
    if done != whole.records:
        return f"the records differ: {done} and {whole.records}"
    return "; ".join(differences(end_of(whole), end_of(resumed), "at the end")[:3])


@pytest.mark.parametrize(
    "seed", [*range(CASES), *(pytest.param(n, marks=pytest.mark.slow) for n in range(CASES, MORE))]
)
def test_an_interrupted_run_of_any_kind_is_bit_equal(tmp_path: Path, seed: int) -> None:
    case = drawn(seed)
    assert difference(case, tmp_path) == "", case


def test_the_drawing_leaves_nothing_out() -> None:
    cases = [drawn(seed) for seed in range(MORE)]

    def values(name: str) -> set[Any]:
        return {case.train[name] for case in cases}

    assert {(c.train["optimizer"], str(c.train["optimizer_args"])) for c in cases} == {
        (path, str(arguments)) for path, arguments in OPTIMIZERS
    }
    assert values("optimizer_rest") == {path for path, _ in RESTS}
    assert values("precision") == {"32-true", "bf16-mixed", "bf16-true"}
    assert values("schedule") == {"cosine", "wsd", "constant"}
    assert values("microbatches") == {1, 2, 3}
    assert values("clip") == {None, 0.5, 1e-3}
    assert values("activation_checkpointing") == values("stable_embedding") == {False, True}
    assert {case.model.tie_embeddings for case in cases} == {False, True}
    assert {case.model.dropout for case in cases} == {0.0, 0.1, 0.5}
    assert {how for case in cases for _, how in case.cuts} == set(INTERRUPTIONS)


def test_a_fault_in_what_is_saved_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that leaves out the optimizer's state, as a run that starts it afresh would."""
    monkeypatch.setattr("reference.training.saving.load_optimizer_state", lambda *_: None)
    found = [difference(drawn(seed), tmp_path / str(seed)) for seed in range(4)]
    assert any(found)
