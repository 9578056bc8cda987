"""Interrupted after any update and resumed, a run is bit-equal to one that was never interrupted (CPU, float32)."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference.config import GPTConfig, TrainConfig
from reference.data import TokenData, write_tokens
from reference.errors import ConfigurationError
from reference.model.gpt import GPT
from reference.optimizers import optimizer_state
from reference.training.saving import numbers_of_schedule
from reference.training.trainer import FitResult, Record, Trainer

UPDATES, MICROBATCHES, ROWS, TIME = 7, 2, 2, 8
MODEL = GPTConfig.tiny(vocab_size=257, block_size=TIME, n_layer=1, dropout=0.1)
SETTINGS: dict[str, Any] = {
    "updates": UPDATES,
    "microbatches": MICROBATCHES,
    "warmup": 2,
    "evaluate_every": 3,
    "accelerator": "cpu",
}
ADAMW8BIT = "bitsandbytes.optim.AdamW8bit"
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer_args": {"lr": 0.01, "weight_decay": 0.1}},
    "SGD": {"optimizer": "torch.optim.SGD", "optimizer_args": {"lr": 0.1, "momentum": 0.9}},
    "AdamW8bit": {"optimizer": ADAMW8BIT, "optimizer_args": {"lr": 0.01}},
    "AdamW8bit, StableEmbedding": {"optimizer": ADAMW8BIT, "stable_embedding": True},
    "GrokAdamW": {"optimizer": "grokadamw.GrokAdamW", "optimizer_args": {"lr": 0.01}},
}
# grokadamw 0.1.2 opens torch.cuda.amp.autocast at every step: deprecated, and off without a GPU.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.cuda.amp.autocast:FutureWarning", "ignore:CUDA is not available"
)


@pytest.fixture
def data(tmp_path: Path) -> tuple[TokenData, TokenData]:
    """Eleven training sequences, of which a run of 28 sees the third epoch begin; and three for validation."""
    draw = np.random.default_rng(0)
    for split, tokens in (("train", 11 * TIME + 3), ("validation", 3 * TIME + 1)):
        about = {"vocab_size": 257, "tokenizer": "bytes", "end_of_document": 256}
        write_tokens(tmp_path / "data", split, [draw.integers(256, size=tokens)], **about)  # type: ignore[arg-type] # of several types
    sizes = {"block_size": TIME, "microbatch_size": ROWS, "seed": 5}
    train, validation = (TokenData(tmp_path / "data", split, **sizes) for split in ("train", "validation"))
    assert train.sequences == 11
    return train, validation


@contextmanager
def seen_tokens() -> Iterator[list[Tensor]]:
    """The token ids (B, T) that a GPT in training mode is called with."""
    seen: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, GPT) and module.training:
            seen.append(arguments[0].clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def fit(directory: Path, data: Any, callbacks: Any = (), resume: Any = False, **changes: Any) -> FitResult:
    (train, validation), model = data, changes.pop("model", MODEL)
    return Trainer(model, TrainConfig(**SETTINGS | changes), directory, callbacks).fit(train, validation, resume)


def differences(expected: Any, seen: Any, where: str) -> list[str]:
    """Where two nested structures differ; tensors bit for bit, dtype included."""
    if isinstance(expected, Tensor):
        same = isinstance(seen, Tensor) and expected.dtype == seen.dtype and torch.equal(expected, seen)
        return [] if same else [where]
    if isinstance(expected, dict) and isinstance(seen, dict):
        if expected.keys() != seen.keys():
            return [f"{where}: {sorted(map(str, expected.keys() ^ seen.keys()))}"]
        return list(itertools.chain(*(differences(expected[key], seen[key], f"{where}[{key}]") for key in expected)))
    if isinstance(expected, Sequence) and not isinstance(expected, str) and len(expected) == len(seen):
        return list(
            itertools.chain(*(differences(e, s, f"{where}[{i}]") for i, (e, s) in enumerate(zip(expected, seen))))
        )
    return [] if expected == seen else [f"{where}: {expected} and {seen}"]


def tensors_of(entry: dict[str, Any]) -> list[Tensor]:
    return [value for value in entry.values() if isinstance(value, Tensor)]


def end_of(result: FitResult) -> dict[str, Any]:
    return {"parameters": result.model.state_dict(), "optimizer": optimizer_state(result.optimizer)}


@pytest.mark.parametrize("changes", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_interrupted_after_any_update(tmp_path: Path, data: Any, changes: dict[str, Any]) -> None:
    with seen_tokens() as tokens:
        whole = fit(tmp_path / "whole", data, save_every=1, **changes)
    expected = end_of(whole)
    assert len(tokens) == UPDATES * MICROBATCHES
    assert [record.update for record in whole.records] == list(range(1, UPDATES + 1))
    rates = [record.learning_rate for record in whole.records]
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[-1], (
        "no warm-up, or no decay: the trace would show nothing"
    )
    bytewise = any(t.dtype == torch.uint8 for entry in whole.optimizer.state.values() for t in tensors_of(entry))
    assert bytewise == ("8bit" in changes.get("optimizer", "")), "the tensors are too small for 8-bit state"
    for done in range(1, UPDATES + 1):
        torch.manual_seed(done)  # a new process has other random numbers
        with seen_tokens() as later:
            resumed = fit(tmp_path / "resumed", data, resume=tmp_path / "whole" / f"step-{done:08d}", **changes)
        assert resumed.records == whole.records[done:]
        assert differences(tokens[done * MICROBATCHES :], later, "tokens") == []
        assert differences(expected, end_of(resumed), f"resumed after update {done}") == []


def test_the_sequences_of_an_epoch_are_seen_once_across_an_interruption(tmp_path: Path, data: Any) -> None:
    with seen_tokens() as tokens:
        for updates in (2, 4, UPDATES):  # the first epoch ends within the third update
            stop = [] if updates == UPDATES else [stopping_after(updates)]
            with pytest.raises(PowerCut) if stop else nothing():
                fit(tmp_path, data, callbacks=stop, save_every=1, resume="auto")
            # The update of the power cut was done, but not saved: it is repeated.
            del tokens[(updates - len(stop)) * MICROBATCHES :]
    rows = [tuple(row) for batch in tokens for row in batch.tolist()]
    assert len(rows) == UPDATES * MICROBATCHES * ROWS
    assert len(set(rows[:11])) == len(set(rows[11:22])) == 11
    assert rows[:11] != rows[11:22], "two epochs in the same order"


class PowerCut(Exception):
    """What ends a run at once."""


def stopping_after(update: int) -> Any:
    def cut(record: Record) -> None:  # before the checkpoint of that update
        if record.update == update:
            raise PowerCut

    return cut


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("cut", range(1, UPDATES + 1))
def test_a_run_that_dies_goes_on_from_its_newest_checkpoint(tmp_path: Path, data: Any, cut: int) -> None:
    whole = fit(tmp_path / "whole", data)
    with pytest.raises(PowerCut):
        fit(tmp_path / "cut", data, callbacks=[stopping_after(cut)], save_every=2)
    resumed = fit(tmp_path / "cut", data, resume="auto", save_every=2)
    assert resumed.records == whole.records[(cut - 1) // 2 * 2 :]
    assert differences(end_of(whole), end_of(resumed), "resumed") == []


@pytest.mark.parametrize("resume", ["True", "auto", "text", "path"])
def test_ways_to_name_a_checkpoint(tmp_path: Path, data: Any, resume: str) -> None:
    whole = fit(tmp_path, data, save_every=3)
    (tmp_path / "step-00000007").rename(tmp_path / "last")
    newest = tmp_path / "step-00000006"
    ways: dict[str, Any] = {"True": True, "auto": "auto", "text": str(newest), "path": newest}
    resumed = fit(tmp_path, data, resume=ways[resume])
    assert resumed.records == whole.records[6:]


def test_a_run_that_is_at_its_end_trains_no_more(tmp_path: Path, data: Any) -> None:
    whole = fit(tmp_path, data, save_every=3)
    resumed = fit(tmp_path, data, resume=True)
    assert resumed.records == []
    assert resumed.stopped is None
    assert differences(end_of(whole), end_of(resumed), "resumed") == []


@pytest.mark.parametrize("before", [False, True])
def test_the_step_is_computed_as_this_run_would(tmp_path: Path, data: Any, before: bool) -> None:
    fit(tmp_path / "run", data, updates=3, save_every=3, optimizer_args={"lr": 0.01, "fused": before})
    expected = {"fused": True, "foreach": None}  # of a run that does not say otherwise
    ended = fit(tmp_path / "run", data, resume="auto", save_every=7, optimizer_args={"lr": 0.01})
    assert len(ended.records) == UPDATES - 3
    assert [{key: group[key] for key in expected} for group in ended.optimizer.param_groups] == [expected] * 2
    ended = fit(tmp_path / "run", data, resume="auto", updates=9, optimizer_args={"lr": 0.01, "foreach": False})
    assert [group["foreach"] for group in ended.optimizer.param_groups] == [False, False]


@pytest.mark.parametrize(("microbatches", "told"), [(2, None), (1, "seen again"), (3, "left out")])
def test_another_number_of_sequences_per_update_is_said(
    tmp_path: Path, data: Any, caplog: pytest.LogCaptureFixture, microbatches: int, told: str | None
) -> None:
    fit(tmp_path, data, save_every=4, updates=4)
    fit(tmp_path, data, resume=True, updates=5, microbatches=microbatches)
    said = [message for message in caplog.messages if "an update has" in message]
    assert len(said) == (told is not None)
    assert all(f"has {2 * microbatches} sequences now, and had 4" in line and str(told) in line for line in said)


def test_another_rate_and_length_are_said(tmp_path: Path, data: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="reference")
    fit(tmp_path, data, save_every=4, updates=4, optimizer_args={"lr": 0.01})
    fit(tmp_path, data, resume=True, updates=5, optimizer_args={"lr": 0.02})
    said = [message for message in caplog.messages if message.endswith("as saved")]
    assert said == [
        "resume: lr is 0.02, as configured now, not 0.01, as saved",
        "resume: updates is 5, as configured now, not 4, as saved",
    ]


def test_a_forged_schedule_is_passed_over() -> None:
    assert numbers_of_schedule({"optimizer_args": [1], "updates": "many", "warmup": 3}) == {"warmup": 3}
    assert numbers_of_schedule(["lr"]) == {}


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    sources = {}
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(name)
        about = {"vocab_size": 257, "tokenizer": "tokenizer.json", "end_of_document": 256}
        write_tokens(folder, "train", [list(range(200))], **about)  # type: ignore[arg-type] # of several types
        sources[name] = TokenData(folder, "train", block_size=TIME, microbatch_size=ROWS, seed=5)
    fit(tmp_path / "out", (sources["first"], None), updates=2, save_every=2)
    with pytest.raises(ConfigurationError, match=r"was trained with a tokenizer other than that of .*second"):
        fit(tmp_path / "out", (sources["second"], None), resume=True)
    assert len(fit(tmp_path / "out", (sources["first"], None), resume=True).records) == UPDATES - 2


def test_old_checkpoints_go_while_the_run_goes_on(tmp_path: Path, data: Any) -> None:
    fit(tmp_path / "out", data, save_every=2, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step-00000006", "step-00000007"]


@pytest.mark.parametrize("schedule", ["wsd", "constant"])
def test_other_schedules(tmp_path: Path, data: Any, schedule: str) -> None:
    whole = fit(tmp_path, data, save_every=4, schedule=schedule)
    resumed = fit(tmp_path, data, resume=tmp_path / "step-00000004", schedule=schedule)
    assert resumed.records == whole.records[4:]


def test_without_dropout_an_interruption_shows_nowhere_either(tmp_path: Path, data: Any) -> None:
    model = GPTConfig.llama(vocab_size=257, block_size=TIME, n_layer=1, n_head=2, n_embd=32)
    whole = fit(tmp_path, data, save_every=3, model=model)
    resumed = fit(tmp_path, data, resume=tmp_path / "step-00000003", model=model)
    assert resumed.records == whole.records[3:]
    assert differences(end_of(whole), end_of(resumed), "resumed") == []
