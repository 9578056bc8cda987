"""Starting from trained weights, without adapters: every weight is trained, and nothing of the shape is repeated."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from reference.__main__ import main
from reference.checkpoint import load_for_inference
from reference.cli.settings import read_settings
from reference.cli.train import warn_of_rate
from reference.config import GPTConfig
from reference.errors import CheckpointError, ConfigurationError
from reference.finetuning import FinetuneConfig
from reference.finetuning.closest import fit_norm
from reference.model.embedding import stable_embedding
from reference.training.trainer import Trainer
from tests.reference.commands import one_error, write_data
from tests.reference.finetuning import EIGHT_BIT, SHAPES, batches, settings, trained, tune
from tests.reference.trainers import Bigram

every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
STILL = {"updates": 1, "optimizer_args": {"lr": 1e-30, "weight_decay": 0.0}}
MOVES = re.compile(r"the first loss is ([\d.]+) .* is ([\d.]+), so it moves by ([+-][\d.]+), because of (.*)")


@every_shape
def test_a_run_begins_at_the_weights_and_not_at_their_optimizer(config: GPTConfig, tmp_path: Path) -> None:
    base = trained(tmp_path / "base", config)
    run = tune(base, tmp_path / "tuned", {}, **STILL)
    weights, expected = run.model.state_dict(), load_for_inference(base).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert run.records[0].update == 1
    assert {int(entry["step"]) for entry in run.optimizer.state.values()} == {1}


def test_the_newest_checkpoint_of_a_run_is_taken(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", SHAPES["llama"], updates=4, save_every=2)
    run = tune(tmp_path / "base", tmp_path / "tuned", {}, **STILL)
    expected = load_for_inference(base).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.model.state_dict().items())


def test_a_run_that_has_a_checkpoint_goes_on_from_that(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", SHAPES["gpt2"])
    whole = tune(base, tmp_path / "whole", {})
    tune(base, tmp_path / "parts", {}, updates=2)
    resumed = tune(tmp_path / "removed since", tmp_path / "parts", {}, resume="auto")
    assert [record.loss for record in resumed.records] == [record.loss for record in whole.records[2:]]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


def test_dropout_may_differ_and_the_shape_may_not(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", SHAPES["gpt2"], updates=1, save_every=1)
    given = replace(SHAPES["gpt2"], dropout=0.5)
    run = Trainer(given, settings(updates=1), tmp_path / "a").fit(batches(), init_from=base)
    assert isinstance(run.model.config, GPTConfig)
    assert run.model.config.dropout == 0.5
    with pytest.raises(ConfigurationError, match=r"n_layer is 3, but the weights of .* have 2: leave it out"):
        Trainer(replace(given, n_layer=3), settings(), tmp_path / "b").fit(batches(), init_from=base)
    with pytest.raises(ConfigurationError, match="was given Bigram: give None, and the shape comes from the folder"):
        Trainer(Bigram(), settings(), tmp_path / "c").fit(batches(), init_from=base)
    with pytest.raises(ConfigurationError, match="there is no model: give a GPTConfig, or a checkpoint to start from"):
        Trainer(None, settings(), tmp_path / "d").fit(batches())
    with pytest.raises(CheckpointError, match="is not a checkpoint of this trainer"):
        Trainer(None, settings(), tmp_path / "e").fit(batches(), init_from=tmp_path / "nowhere")


def test_stable_embedding_in_front_of_a_trained_table_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = trained(tmp_path / "base", SHAPES["gpt2"])
    caplog.set_level(logging.INFO, logger="reference")
    run = tune(base, tmp_path / "tuned", {}, **EIGHT_BIT, stable_embedding=True)
    [found] = [match for record in caplog.records if (match := MOVES.search(record.getMessage()))]
    after, before, moved, causes = found.groups()
    assert float(after) - float(before) == pytest.approx(float(moved), abs=2e-4)
    assert float(after) == pytest.approx(run.records[0].loss, abs=1e-4)
    assert float(moved) > 1e-3  # it is the swap, and not rounding
    assert re.findall(r"rows of (\w+) change least: by", causes) == ["embedding", "position"]


def test_nothing_is_told_where_nothing_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = trained(tmp_path / "base", SHAPES["gpt2"], updates=1, save_every=1)
    caplog.set_level(logging.INFO, logger="reference")
    tune(base, tmp_path / "tuned", {}, **EIGHT_BIT)
    assert not [record for record in caplog.records if MOVES.search(record.getMessage())]


def test_the_norm_is_the_closest_that_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(64, 16, generator=generator) * torch.rand(64, 1, generator=generator) + 0.3
    stable = stable_embedding(nn.Embedding(64, 16, _weight=table))
    told = fit_norm(stable)

    def left() -> float:
        with torch.no_grad():
            return float((stable(torch.arange(64)) - table).norm() / table.norm())

    assert told == pytest.approx(left(), rel=1e-5)
    norm = stable.norm
    assert isinstance(norm, nn.LayerNorm)
    for tensor in (norm.weight, norm.bias):
        for step in (0.01, -0.01):
            with torch.no_grad():
                tensor[3] += step
                assert left() > told
                tensor[3] -= step


def test_equally_long_rows_around_zero_are_kept() -> None:
    table = nn.functional.layer_norm(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), (16,)) * 0.02
    assert fit_norm(stable_embedding(nn.Embedding(32, 16, _weight=table))) < 1e-3


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"quantize": "nf4"}, "quantize is 'nf4', but quantised weights cannot be trained: set lora_rank too"),
        ({"embeddings": True}, "embeddings is True, but it belongs to LoRA, and lora_rank is None"),
        ({"lora_alpha": 8}, "lora_alpha is 8, but it belongs to LoRA"),
        ({"lora_rank": 0}, "lora_rank is 0: give at least 1, or None"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha is 0: give at least 1, or None"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, r"lora_dropout is 1.0, but must be in \[0, 1\)"),
        ({"lora_rank": 4, "quantize": "nf5"}, "quantize is 'nf5', but must be one of 'none', 'nf4'"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        FinetuneConfig(**given)  # type: ignore[arg-type] # on purpose


# the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = GPTConfig.gpt2(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=64)
    Trainer(config, settings(updates=1, save_every=1), "out/base").fit(batches())
    return write_data(tmp_path / "data")


SHORT = ["--data.path", "data", "--train.updates", "2", "--train.evaluate_batches", "1"]


def test_the_command_takes_shape_and_gentle_rates_from_the_folder(
    started: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--init_from", "out/base", *SHORT]) == 0
    told = capsys.readouterr().err
    assert "lr 2e-05" in told
    assert sorted(path.name for path in Path("out/base-tuned").iterdir()) == ["config.yaml", "metrics", "step-00000002"]
    again = ["train", "--config", "out/base-tuned/config.yaml", "--resume", "auto", "--train.updates", "3"]
    Path("out/base").rename("elsewhere")  # the run has begun, so it needs them no more
    assert main(again) == 0
    assert "resume: from out/base-tuned/step-00000002" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "rate"),
    [([], 2e-5), (["--finetune.lora_rank", "4"], 2e-4), (["--finetune.lora_rank=null"], 2e-5)],
)
def test_adapters_learn_faster(started: Path, words: list[str], rate: float) -> None:
    settings = read_settings(["--init_from", "out/base", *words])
    assert settings.train.optimizer_args["lr"] == pytest.approx(rate)
    assert (settings.directory, settings.model.n_embd) == ("out/base-tuned", 64)


def test_a_rate_of_pretraining_is_told(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--init_from", "out/base", *SHORT, "--train.optimizer_args.lr", "3e-3"]) == 0
    assert "a learning rate of 0.003 is for pretraining" in capsys.readouterr().err


MUON = ["--optimizer", "torch.optim.Muon"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--lr", "3e-3"], ["optimizer_args.lr 2e-5"]),
        ([*MUON, "--lr", "0.02"], ["optimizer_args.lr 2e-4"]),
        ([*MUON, "--train.optimizer_rest_args.lr", "0.01"], ["optimizer_rest_args.lr 2e-5"]),
        ([*MUON, "--train.optimizer_args", "{lr: 0.02, adjust_lr_fn: match_rms_adamw}"], ["optimizer_args.lr 2e-5"]),
        (["--optimizer", "torch.optim.SGD", "--train.optimizer_args", "{lr: 0.1}"], []),
        (MUON, []),
        ([], []),
    ],
)
def test_the_rate_that_is_advised_is_the_optimizers(
    started: Path, words: list[str], advice: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Muon's rates are not AdamW's, and of SGD's none is known to be too large."""
    caplog.set_level("WARNING", "reference")
    warn_of_rate(None, read_settings(["--init_from", "out/base", *words]))
    said = [record.getMessage() for record in caplog.records]
    assert [text.rpartition("set --train.")[2] for text in said] == advice


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--init_from", ""], "--init_from: the name is empty."),
        (["--init_from", "nowhere"], "nowhere is not a checkpoint and holds none: "),
        (["--init_from", "out/base", "--preset", "tiny"], "--preset gives a model's shape, and --init_from takes it"),
        (["--init_from", "theirs"], "theirs is a folder of transformers: make a checkpoint of it with 'python -m"),
        (["--init_from", "out/base", "--model.n_layer", "3"], "n_layer is 3, but the weights of out/base have 1: "),
        (["--init_from", "out/base", "--finetune.quantize", "nf4"], "quantize is 'nf4', but quantised weights cannot"),
        (["--init_from", "out/base", "--directory", "out/base"], "out/base holds checkpoints of an earlier run"),
    ],
)
def test_mistakes_are_one_sentence(
    started: Path, words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text('{"model_type": "gpt2"}')
    assert main(["train", *words, *SHORT, "--train.evaluate_every", "null"]) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {problem}")


def test_a_resume_with_another_shape_names_the_other_way(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "out/base", "--directory", "out/b", *SHORT, "--train.warmup", "0"]) == 2
    told = capsys.readouterr().err
    assert "error: block_size is 128, but out/base/step-00000001 was trained with 16: to start from its weights" in told
    assert "give --init_from out/base/step-00000001 in place of --resume" in told


def test_an_adapter_of_a_run_without_adapters_cannot_be_exported(
    started: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--format", "peft", "--checkpoint", "out/base", "--out", "adapter"]) == 2
    assert "has no adapters, because its run trained every weight: export it with --format" in one_error(capsys)
    assert not Path("adapter").exists()
