"""python -m reference: every command, what it says, and how it ends."""

import csv
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reference.__main__ import COMMANDS, main
from reference.cli.evaluation import Evaluation
from reference.cli.loggers import metrics_file
from reference.cli.settings import read_settings
from reference.errors import CheckpointError, ConfigurationError, DataError, TrainingError
from reference.training.trainer import Record
from tests.reference.commands import SHORT, SMALL, TEXT, one_error, train, write_data


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data folder of bytes, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return str(write_data(Path("data/mine")))


# runs ------------------------------------------------------------------------------------------------------------


def rows(directory: str) -> list[dict[str, str]]:
    with metrics_file(Path(directory)).open(newline="") as lines:
        return list(csv.DictReader(lines))


def steps(directory: str) -> list[str]:
    return [row["step"] for row in rows(directory)]


def test_train_writes_settings_metrics_and_checkpoints(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--directory", "out/run") == 0
    told = capsys.readouterr().err
    assert "update 4/4: loss " in told
    assert "update 3/4" not in told  # log_every is 10
    assert "Try: python -m reference generate --checkpoint out/run" in told
    assert steps("out/run") == ["1", "2", "3", "4"]
    written = read_settings(["--config", "out/run/config.yaml"])
    assert written == read_settings(
        ["--data.path", data, *SMALL, *SHORT, "--train.save_every=2", "--directory=out/run"]
    )
    assert json.loads(Path("out/run/step-00000004/config.json").read_text())["tokenizer"] == "bytes"


def test_a_run_goes_on_from_its_own_settings(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--directory", "out/whole", "--train.updates", "6") == 0
    assert train(data, "--directory", "out/run", "--train.updates", "6") == 0
    for name in os.listdir("out/run"):
        if name == "step-00000006":
            Path("out/run", name).rename("aside")  # as if the run had been killed after update 5
    assert main(["train", "--config", "out/run/config.yaml", "--resume", "auto"]) == 0
    assert "from out/run/step-00000004, after update 4" in capsys.readouterr().err
    assert steps("out/run") == ["1", "2", "3", "4", "5", "6"]
    weights = [Path("out", run, "step-00000006/model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]


def test_a_fresh_start_does_not_mix_with_an_earlier_run(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    capsys.readouterr()
    before = Path("out/tiny/config.yaml").read_bytes()
    assert train(data, "--train.seed", "3") == 2
    assert one_error(capsys).startswith("out/tiny holds checkpoints of an earlier run, up to step-00000004: go on ")
    assert Path("out/tiny/config.yaml").read_bytes() == before


def test_settings_that_do_not_fit_the_checkpoint_replace_none(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    before = Path("out/tiny/config.yaml").read_bytes()
    again = ["train", "--config", "out/tiny/config.yaml", "--resume", "auto", "--train.updates", "6"]
    assert main([*again, "--model.n_embd", "32"]) == 1
    assert "belongs to a model of another shape" in capsys.readouterr().err
    assert Path("out/tiny/config.yaml").read_bytes() == before
    assert main(again) == 0
    assert read_settings(["--config", "out/tiny/config.yaml"]).train.updates == 6


@pytest.mark.parametrize("arguments", ["--help", "train --print_config", "prepare --help"])
def test_output_that_cannot_be_written_ends_quietly(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(arguments.split()) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' device that is always full")
def test_a_full_disk_behind_the_output_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["train", "--print_config"]) == 1
    assert one_error(capsys) == "No space left on device."


def test_damage_of_a_checkpoint_is_told_before_its_tokenizer_is_missed(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data) == 0
    Path("out/tiny/step-00000004/config.json").write_text("{")
    capsys.readouterr()
    assert main(["generate", "--checkpoint", "out/tiny"]) == 1
    assert "config.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(
    number: signal.Signals,
    code: int,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(directory: Path) -> Callable[[Record], None]:
        return lambda record: os.kill(os.getpid(), number) if record.update == 1 else None

    monkeypatch.setattr("reference.cli.loggers.csv_metrics", interrupt)
    assert train(data, "--train.save_every", "null") == code
    told = capsys.readouterr().err
    assert f"stopped by {number.name}" in told
    assert "Go on with: python -m reference train --config out/tiny/config.yaml --resume auto" in told
    assert len(list(Path("out/tiny").glob("step-*"))) == 1


def test_default_data_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        Path(f"{number}.py").write_bytes(TEXT + b"%d" % number)
    monkeypatch.setattr("reference.data.prepare.standard_library", lambda: sorted(tmp_path.glob("*.py")))
    once = ["--train.evaluate_every", "null", "--train.save_every", "null"]
    assert main(["train", *SMALL, *SHORT, *once]) == 0
    assert "preparing data/standard-library from this Python's standard library" in capsys.readouterr().err
    assert main(["train", *SMALL, *SHORT, *once]) == 0
    assert "preparing" not in capsys.readouterr().err


def test_tiny_takes_the_vocabulary_of_the_data_unless_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(write_data(Path("data"), vocab_size=300))
    assert train(data) == 0
    assert read_settings(["--config", "out/tiny/config.yaml"]).model.vocab_size == 300
    capsys.readouterr()
    assert train(data, "--model.vocab_size", "280", "--directory", "out/other") == 2
    assert "the data has a vocabulary of 300 tokens, but the model one of 280" in capsys.readouterr().err


def test_generate_evaluate_export_and_import(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    recorded = float(rows("out/tiny")[-1]["validation_loss"])
    capsys.readouterr()

    generate = ["generate", "--prompt", "def ", "--tokens", "9", "--seed", "1", "--checkpoint"]
    texts = []
    for checkpoint in ("out/tiny", "out/tiny/step-00000004", "out/tiny/step-00000002"):
        assert main([*generate, checkpoint]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ")
    assert texts[0] == texts[1] != texts[2]

    assert main(["evaluate", "--checkpoint", "out/tiny", "--data", data, "--microbatch_size", "3"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"loss {recorded:.4f} nats per token, perplexity {math.exp(recorded):.2f}, ")
    targets, size = 2 * len(TEXT) + 1, 2 * len(TEXT) - 1
    assert f"{recorded * targets / size / math.log(2):.4f} bits per byte ({targets} tokens)" in told

    assert main(["export", "--checkpoint", "out/tiny", "--out", "theirs"]) == 0
    assert main(["import", "--format", "huggingface", "--from", "theirs", "--out", "ours"]) == 0
    assert capsys.readouterr().out == "Written: theirs\nWritten: ours/step-00000000\n"
    assert main([*generate, "ours"]) == 0
    assert capsys.readouterr().out == texts[0]


def test_an_import_is_fine_tuned_by_its_own_settings(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    assert main(["export", "--checkpoint", "out/tiny", "--out", "theirs"]) == 0
    assert main(["import", "--from", "theirs", "--out", "ours"]) == 0
    told = capsys.readouterr().err
    assert "--tokenizer bytes --out data/ours, then python -m reference train --config ours/config.yaml" in told
    settings = read_settings(["--config", "ours/config.yaml"])
    assert (settings.directory, settings.resume, settings.data.path) == ("ours", "auto", "data/ours")
    assert settings.model.n_embd == 16

    before = checkpoint_loss("ours/step-00000000", data, capsys)
    tune = ["train", "--config", "ours/config.yaml", "--data.path", data, "--train.updates", "3"]
    assert main(tune) == 0
    told = capsys.readouterr().err
    assert "the weights of ours/step-00000000; it has no optimizer state, which starts afresh" in told
    assert "is for pretraining" not in told
    assert sorted(os.listdir("ours")) == ["config.yaml", "metrics", "step-00000000", "step-00000003"]
    assert checkpoint_loss("ours/step-00000003", data, capsys) < before
    assert main([*tune[:-1], "5"]) == 0  # goes on from its own newest
    assert "from ours/step-00000003, after update 3" in capsys.readouterr().err


def test_a_rate_of_pretraining_on_imported_weights_is_told(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    assert main(["export", "--checkpoint", "out/tiny", "--out", "theirs"]) == 0
    Path("ours").mkdir()
    Path("ours/config.yaml").write_text("preset: tiny")
    assert main(["import", "--from", "theirs", "--out", "ours"]) == 0
    assert "ours/config.yaml is there already and stays as it is" in capsys.readouterr().err
    assert Path("ours/config.yaml").read_text() == "preset: tiny"
    assert train(data, "--resume", "ours", "--directory", "out/tuned") == 0
    assert "a learning rate of 0.003 is for pretraining" in capsys.readouterr().err


def checkpoint_loss(checkpoint: str, data: str, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", checkpoint, "--data", data]) == 0
    return float(capsys.readouterr().out.split()[1])


def test_evaluate_refuses_data_of_another_tokenizer(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    Path("text.txt").write_bytes(TEXT * 20)
    assert main(["prepare", "--text", "text.txt", "--tokenizer", "bpe:257", "--out", "data/bpe"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", "out/tiny", "--data", "data/bpe"]) == 2
    assert "was trained with a tokenizer other than that of data/bpe" in capsys.readouterr().err


def test_bits_per_byte_by_hand() -> None:
    """Ten tokens of one bit each, two of them ends of documents, on eight bytes."""
    assert Evaluation(math.log(2), 10, 8).bits_per_byte == pytest.approx(1.25)
    assert Evaluation(math.log(2), 10, None).describe() == "loss 0.6931 nats per token, perplexity 2.00 (10 tokens)"
    assert Evaluation(1e4, 1, None).perplexity == math.inf


def test_prepare_tells_what_it_wrote(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").write_bytes(TEXT)
    assert main(["prepare", "--text", "text.txt", "--out", "data/text", "--validation_share", "0.2"]) == 0
    assert "vocabulary 257" in capsys.readouterr().out
    assert main(["prepare", "--text", "absent", "--out", "data/text"]) == 1
    assert "there is no text at absent" in one_error(capsys)


# failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data.path nowhere", "there is no folder nowhere with a train split"),
        ("train --resume nowhere", "nowhere is not a checkpoint and holds none: "),
        ("train --resume true", "resume=True, but out/tiny holds no checkpoint: "),
        ("generate --checkpoint nowhere", "nowhere is not a checkpoint and holds none: "),
        ("export --checkpoint nowhere --out theirs", "nowhere is not a checkpoint and holds none: "),
        ("import --from nowhere --out ours", "nowhere/config.json cannot be read"),
    ],
)
def test_what_is_missing_is_one_sentence_and_code_1(
    arguments: str, message: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 1
    assert one_error(capsys).startswith(message)
    assert not Path("out").exists()  # nothing was begun


def test_a_directory_that_cannot_be_written_is_one_sentence(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").write_text("a file")
    assert train(data) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: checkpoints cannot be written to out/tiny: Not a directory. Choose a directory that")


def test_a_gpu_that_is_full_is_one_sentence(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("reference.training.trainer.Trainer.fit", full)
    assert train(data) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "error: the GPU does not have enough memory for microbatches of 2: halve --data.microbatch_size"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("no"), 2),
        (CheckpointError("no"), 1),
        (DataError("no"), 1),
        (TrainingError("no"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "train", (fail, ""))
    assert main(["train"]) == code
    assert capsys.readouterr().err == ("Stopped at once.\n" if code == 130 else "error: no\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_is_imported(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most of the first tenth of a second; before it, the interpreter itself is being started."""

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == "Stopped at once.\n"


def test_nothing_that_takes_time_is_imported_before_ctrl_c_is_heard() -> None:
    code = "import sys, reference.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"jsonargparse", "yaml", "torch", "numpy", "rich"}.intersection(done.stdout.split())


def test_files_beside_the_checkpoints_that_cannot_be_written_cost_none(
    data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out/tiny/config.yaml").mkdir(parents=True)
    Path("out/tiny/metrics/metrics.csv").mkdir(parents=True)
    assert train(data) == 0
    told = capsys.readouterr().err
    assert "warning: out/tiny/config.yaml cannot be written after update 1 (" in told
    assert "warning: out/tiny/metrics/metrics.csv cannot be written after update 1 (" in told
    assert Path("out/tiny/step-00000004").is_dir()


@pytest.mark.parametrize("error", [ValueError("a fault of the program"), RuntimeError("another")])
def test_a_fault_of_the_program_is_no_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "train", (fail, ""))
    with pytest.raises(type(error), match=str(error)):
        main(["train"])
