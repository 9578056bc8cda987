"""What somebody meets in the first hour with the trainer: samples, a part of an evaluation, wandb, few updates."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from reference.__main__ import main
from reference.cli import progress
from reference.cli.evaluation import evaluate_checkpoint
from reference.cli.progress import waiting
from reference.config import GPTConfig, TrainConfig
from reference.data.tokenizer import load_tokenizer
from reference.errors import ConfigurationError, TrainingError
from reference.heartbeat import heartbeat
from reference.training.trainer import Trainer
from tests.reference.commands import SMALL, one_error, train, write_data
from tests.sentences import sentence_of

# samples ---------------------------------------------------------------------------------------------------------


def test_samples_change_nothing(tmp_path: Path) -> None:
    from reference.data import TokenData
    from reference.model.generation import generate

    write_data(tmp_path / "data")
    config = GPTConfig.tiny(vocab_size=257, dropout=0.1)
    ends, drawn = [], []

    def sample(model: torch.nn.Module, update: int) -> None:
        drawn.append((update, list(generate(model, [7], tokens=9, seed=1))))

    for every in (None, 2):
        data = TokenData(tmp_path / "data", "train", block_size=8, microbatch_size=2, seed=0)
        run = TrainConfig(updates=5, sample_every=every, optimizer_args={"lr": 1e-2})
        ends.append(Trainer(config, run, tmp_path / "out", sample=sample).fit(data))
    assert [update for update, _ in drawn] == [2, 4, 5]
    assert all(len(ids) == 9 for _, ids in drawn)
    assert [record.loss for record in ends[0].records] == [record.loss for record in ends[1].records]
    states = [end.model.state_dict() for end in ends]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_prints_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_data(tmp_path / "data"))
    more = ["--sample-every", "3", "--sample_prompt", "def ", "--directory", str(tmp_path / "out")]
    assert train(data, *more) == 0
    told = capsys.readouterr().err
    assert told.count("sample after update 3:\n    def ") == 1
    assert told.count("sample after update 4:\n    def ") == 1


def test_a_prompt_that_is_too_long_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_data(tmp_path / "data"))
    assert train(data, "--sample_every=1", "--sample_prompt", "x" * 17, "--directory", str(tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert "error: the prompt has 17 tokens, but the model sees 16" in told
    assert "update 1/" not in told


# evaluate --batches ----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A run and its data."""
    data = write_data(tmp_path / "data")
    assert train(str(data), "--directory", str(tmp_path / "run")) == 0
    return tmp_path / "run" / "step-00000004", data


def test_the_first_batches(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    whole = evaluate_checkpoint(*trained, microbatch_size=2)
    assert evaluate_checkpoint(*trained, microbatch_size=2, batches=10**6) == whole
    parts = [evaluate_checkpoint(*trained, microbatch_size=2, batches=number) for number in (1, 2, 12)]
    assert [part.tokens for part in parts] == [32, 64, 384]
    assert [part.size for part in parts] == [32, 64, 383]  # the first document ends after 320 bytes
    assert parts[0].loss != parts[2].loss != whole.loss
    capsys.readouterr()
    words = ["evaluate", "--checkpoint", str(trained[0]), "--data", str(trained[1]), "--batches"]
    assert main([*words, "1", "--microbatch_size", "2"]) == 0
    assert "(32 tokens)" in capsys.readouterr().out
    assert main([*words, "0"]) == 2
    assert one_error(capsys) == "batches is 0: give a number of at least 1, or None for all."


# few updates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [3, 10])
def test_few_updates_need_no_other_setting_and_learn(
    updates: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    words = ["--data", str(data), "--directory", str(tmp_path / "out"), *SMALL, "--updates", str(updates)]
    assert main(["train", *words]) == 0
    told = capsys.readouterr().err
    losses = [float(part.split(",")[0]) for part in told.split(": loss ")[1:]]
    assert losses[-1] < losses[0]
    assert f"Written: {tmp_path}/out/config.yaml, {tmp_path}/out/metrics/metrics.csv, {tmp_path}/out/step-" in told


# wandb -----------------------------------------------------------------------------------------------------------


class Recorder:
    """What wandb's logger for Fabric does, without a network."""

    made: list["Recorder"] = []

    def __init__(self, **options: Any) -> None:
        if options["project"] == "refused":
            raise RuntimeError("No API key configured.\nUse wandb login")
        self.options, self.rows, self.ended = options, list[tuple[dict[str, Any], int]](), -1
        self.made.append(self)

    @property
    def experiment(self) -> "Recorder":
        return self

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code

    def log_hyperparams(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def log_metrics(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((row, step))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    names = ["wandb", "wandb.integration", "wandb.integration.lightning", "wandb.integration.lightning.fabric"]
    modules = [ModuleType(name) for name in names]
    modules[-1].WandbLogger = Recorder  # type: ignore[attr-defined] # a module made here
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


def test_wandb_gets_settings_and_every_update(tmp_path: Path, wandb: type[Recorder]) -> None:
    data = str(write_data(tmp_path / "data"))
    assert train(data, "--wandb", "mine", "--directory", str(tmp_path / "out")) == 0
    (run,) = wandb.made
    assert run.options == {"project": "mine", "name": "out", "save_dir": str(tmp_path / "out")}
    assert run.settings["train"]["updates"] == 4
    assert [step for _, step in run.rows] == [1, 2, 3, 4]
    assert ["validation_loss" in row for row, _ in run.rows] == [False, True, False, True]
    assert run.ended == 0


def test_wandb_learns_that_a_run_failed(tmp_path: Path, wandb: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TrainingError("the loss is not finite.")

    monkeypatch.setattr(Trainer, "fit", fail)
    data = str(write_data(tmp_path / "data"))
    assert train(data, "--wandb", "mine", "--directory", str(tmp_path / "out")) == 1
    assert [run.ended for run in wandb.made] == [1]


def test_wandb_that_cannot_start_is_one_sentence(
    tmp_path: Path, wandb: type[Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_data(tmp_path / "data"))
    assert train(data, "--wandb", "refused", "--directory", str(tmp_path / "out")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: wandb cannot start a run in the project 'refused' (No API key configured): log in")


def test_without_wandb_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = str(write_data(tmp_path / "data"))
    assert train(data, "--wandb", "mine", "--directory", str(tmp_path / "out")) == 2
    assert "run pip install 'gpt-conformance[wandb]', or leave it out" in capsys.readouterr().err


# what is waited for ----------------------------------------------------------------------------------------------


def test_a_name_of_the_hub_says_how_to_get_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = sentence_of(ConfigurationError, lambda: load_tokenizer("meta-llama/Llama-3.2-1B"))
    assert "'hf download meta-llama/Llama-3.2-1B tokenizer.json --local-dir Llama-3.2-1B'" in told
    assert "give Llama-3.2-1B/tokenizer.json" in told
    told = sentence_of(ConfigurationError, lambda: load_tokenizer("gpt2"))
    assert "hf download gpt2 tokenizer.json --local-dir gpt2" in told
    for path in ("gpt2.json", "./gpt2", "a/b/c"):
        assert "hf download" not in sentence_of(ConfigurationError, lambda path=path: load_tokenizer(path))  # type: ignore[misc] # a default


def test_a_heart_beats_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.heartbeat.EVERY", 0.001)
    twice = threading.Semaphore(0)
    with heartbeat(twice.release):
        assert twice.acquire(timeout=10)
        assert twice.acquire(timeout=10)
    while twice.acquire(blocking=False):
        pass
    assert not twice.acquire(timeout=0.05)


def test_what_is_waited_for_shows_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def once(tell: Callable[[], None]) -> Iterator[None]:
        tell()
        yield

    monkeypatch.setattr(progress, "heartbeat", once)
    with waiting("Importing"):
        pass
    assert capsys.readouterr().err == "Importing: 0 s so far\n"
