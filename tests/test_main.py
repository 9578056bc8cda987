"""python -m reference: every command, what it says, and how it ends."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from reference.__main__ import COMMANDS, main
from reference.checkpoint import CheckpointError
from reference.config import ConfigurationError, DataConfig, GPTConfig, TrainConfig
from reference.data import DataError, write_tokens
from reference.evaluation import Evaluation
from reference.loggers import metrics_file
from reference.presets import PRESETS
from reference.settings import Settings, read_settings, sentence
from reference.trainer import Record
from reference.update import TrainingError

SMALL = [
    *("--model.n_layer=1", "--model.n_embd=16", "--model.n_head=2", "--model.block_size=16"),
    "--data.microbatch_size=2",
]
SHORT = ["--train.updates=4", "--train.warmup=1", "--train.evaluate_every=2", "--train.evaluate_batches=null"]
TEXT = b"def add(a, b):\n    return a + b\n" * 10


def write_data(folder: Path, vocab_size: int = 257) -> Path:
    for split in ("train", "validation"):
        documents = [list(TEXT), list(TEXT[::-1])]
        write_tokens(folder, split, documents, vocab_size=vocab_size, tokenizer="bytes", end_of_document=256)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data folder of bytes, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return str(write_data(Path("data/mine")))


def train(data: str, *more: str) -> int:
    return main(["train", "--data.path", data, *SMALL, *SHORT, "--train.save_every", "2", *more])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on stderr: a single line that begins with ``error: ``, without it."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# settings --------------------------------------------------------------------------------------------------------


def test_the_default_is_the_preset_tiny() -> None:
    tiny = PRESETS["tiny"]
    assert read_settings([]) == Settings("tiny", tiny.model, tiny.train, tiny.data, "out/tiny", False, False)


def test_preset_then_file_then_command_line(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "preset: gpt2-350m\nmodel: {n_layer: 3, n_head: 2}\ntrain: {updates: 7, warmup: 0, optimizer_args: {lr: 1}}\n"
    )
    second.write_text("model: {n_layer: 4}\n")
    settings = read_settings(["--train.updates", "9", "--config", str(first), f"--config={second}", "--train.warmup=1"])
    assert settings.preset == "gpt2-350m"
    assert settings.model == GPTConfig(n_layer=4, n_head=2, n_embd=1024, fp32_residual=False)
    assert (settings.train.updates, settings.train.microbatches) == (9, 16)
    assert settings.train.optimizer_args == {"lr": 1}  # a mapping in a file replaces the preset's
    assert read_settings(["--config", str(first), "--preset", "tiny"]).model.n_embd == 128


def test_one_keyword_of_the_optimizer() -> None:
    settings = read_settings(["--train.optimizer_args.lr", "3e-4", "--train.optimizer_args.betas", "[0.8, 0.9]"])
    assert settings.train.optimizer_args == {"lr": 3e-4, "betas": [0.8, 0.9], "weight_decay": 0.1}
    assert read_settings(["--train.optimizer_args", "{lr: 1e-2}"]).train.optimizer_args == {"lr": 0.01}


@pytest.mark.parametrize(
    ("given", "resume"),
    [("true", True), ("false", False), ("auto", "auto"), ("out/step-00000002", "out/step-00000002")],
)
def test_resume(given: str, resume: bool | str) -> None:
    assert read_settings(["--resume", given]).resume == resume


@pytest.mark.parametrize("preset", PRESETS)
def test_what_print_config_prints_runs_the_same(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--train.min_lr", "1e-05", "--model.rope_theta", "1e16", "--train.clip", "null", "--resume", "auto"]
    arguments = ["--preset", preset, "--directory", "out/ü", "--tensorboard", *changes]
    assert main(["train", *arguments, "--print_config"]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert read_settings(["--config", str(file)]) == read_settings(arguments)


def test_print_config_of_settings_that_cannot_work_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model.n_head", "3", "--print_config"]) == 2
    assert "n_embd 128 is not divisible by n_head 3" in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "there is no command 'trian', did you mean train?"),
        ("train --lr 3", "there is no option '--lr', did you mean --train.optimizer_args.lr?"),
        ("train --updates 3", "there is no option '--updates', did you mean --train.updates?"),
        ("train --train.updats=3", "there is no option '--train.updats', did you mean --train.updates?"),
        ("train --model.n_layr 3", "there is no option '--model.n_layr', did you mean --model.n_layer?"),
        ("train --train.upd 3", "there is no option '--train.upd', did you mean --train.updates?"),  # no abbreviations
        ("train --frobnicate", "there is no option '--frobnicate', see python -m reference train --help."),
        ("train now", "'now' belongs to no option: write --NAME VALUE, "),
        ("train --preset gpt2-124", "there is no preset 'gpt2-124': did you mean gpt2-124m"),
        ("train --preset", "--preset: expected one argument."),
        ("train --model.n_layer 3.5", "model.n_layer is '3.5', but must be a whole number."),
        ("train --train.min_lr None", "train.min_lr is 'None', but must be a number or null."),
        ("train --train.compile 1", "train.compile is '1', but must be true or false."),
        (
            "train --train.optimizer_args 3",
            "train.optimizer_args is '3', but must be a mapping, for example {lr: 3e-4}.",
        ),
        ("train --train run.yaml", "--train takes a YAML file or a mapping of settings; "),
        ("train --train.seed -1", "seed is -1, but must lie between 0 and 2**32 - 1."),
        ("train --train.min_lr -1", "min_lr is -1.0: give a rate of at least 0, or None for a tenth of lr."),
        ("train --directory=", "--directory is empty: give a folder, for example out/tiny."),
        ("export --checkpoint x --out=", "--out: the name is empty."),
        ("train --data.microbatch_size 0", "microbatch_size is 0, but must be at least 1."),
        (
            "train --config missing.yaml",
            "the configuration file missing.yaml cannot be read: No such file or directory.",
        ),
        ("generate", "the following arguments are required: --checkpoint."),
        ("generate --chekpoint x", "there is no option '--chekpoint', did you mean --checkpoint?"),
        ("generate --checkpoint x --top_k two", "--top_k: invalid int value: 'two'."),
        ("generate --checkpoint x y", "'y' belongs to no option: "),
        ("export --format onnx --checkpoint x --out y", "--format: invalid choice: 'onnx' (choose from "),
        ("prepare --text x", "--text needs --out, the folder to write to, for example --out data/mine."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert one_error(capsys).startswith(message)


def test_a_value_that_is_no_choice_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model.norm", "rms"]) == 2
    said = one_error(capsys).replace("is 'rms', but ", "")  # jsonargparse 4.53 tells the value, 4.41 does not
    assert said == "model.norm must be one of layernorm, rmsnorm."


@pytest.mark.parametrize("word", ["Unrecognized", "unrecognized"])  # jsonargparse 4.41, 4.53
def test_an_unknown_option_is_told_by_all_releases_of_jsonargparse(word: str) -> None:
    said = sentence(f"{word} arguments: --updates 3", ["--train.updates", "--train.seed"])
    assert said == "there is no option '--updates', did you mean --train.updates?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {n_layer: 2\n", "is no valid YAML at line 2, column 1: "),
        ("model:\n  n_layr: 2\n", "has 'model.n_layr', did you mean model.n_layer?"),
        ("modle:\n  n_layer: 2\n", "has 'modle', did you mean model?"),
        ("- 1\n", "holds no settings: write lines like 'preset: tiny'."),
        ("", "holds no settings: write lines like 'preset: tiny'."),
    ],
)
def test_a_wrong_file_is_one_sentence(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert main(["train", "--config", str(file)]) == 2
    assert one_error(capsys).startswith(f"the configuration file {file} {message}")


def test_a_wrong_type_in_a_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {n_layer: two}\n")
    assert main(["train", "--config", str(file)]) == 2
    assert one_error(capsys) == "model.n_layer is 'two', but must be a whole number."


# help ------------------------------------------------------------------------------------------------------------


def test_help_needs_no_torch() -> None:
    """In a process of its own, since torch is imported here: help must come at once."""
    code = (
        "import sys; from reference.__main__ import COMMANDS, main\n"
        "main(['--help'])\n"
        "for command in COMMANDS:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "sys.exit(','.join({'torch', 'lightning', 'numpy'}.intersection(sys.modules)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("examples:") == 1 + len(COMMANDS)


def test_help_of_train_shows_the_docstrings_and_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--preset", "llama-1.2b", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Longest sequence, in tokens, that the model can see. (type: int, default: 2048)" in printed
    assert "e.g. bitsandbytes.optim.AdamW8bit" in printed
    assert all(preset.about in printed for preset in PRESETS.values())


def test_no_command_is_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


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

    monkeypatch.setattr("reference.loggers.csv_metrics", interrupt)
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
    monkeypatch.setattr("reference.prepare.standard_library", lambda: sorted(tmp_path.glob("*.py")))
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


def test_evaluate_refuses_data_of_another_tokenizer(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    Path("text.txt").write_bytes(TEXT * 20)
    assert main(["prepare", "--text", "text.txt", "--tokenizer", "bpe:257", "--out", "data/bpe"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", "out/tiny", "--data", "data/bpe"]) == 2
    assert "was trained on ids of another tokenizer than that of data/bpe" in capsys.readouterr().err


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
        ("train --data.path nowhere", "nowhere has no train split"),
        ("train --resume nowhere", "nowhere is no checkpoint and holds none: "),
        ("train --resume true", "resume=True, but out/tiny holds no checkpoint: "),
        ("generate --checkpoint nowhere", "nowhere is no checkpoint and holds none: "),
        ("export --checkpoint nowhere --out theirs", "nowhere is no checkpoint and holds none: "),
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
    assert told == "error: the directory out/tiny cannot be written (Not a directory): choose another with --directory."


def test_a_gpu_that_is_full_is_one_sentence(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("reference.trainer.Trainer.fit", full)
    assert train(data) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: the GPU has not enough memory for microbatches of 2: halve --data.microbatch_size")


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


@pytest.mark.parametrize("error", [ValueError("a fault of the program"), RuntimeError("another")])
def test_a_fault_of_the_program_is_no_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "train", (fail, ""))
    with pytest.raises(type(error), match=str(error)):
        main(["train"])


def test_every_field_can_be_given_in_a_file(tmp_path: Path) -> None:
    plain = read_settings([]).plain()
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert read_settings(["--config", str(file)]).plain() == plain
    groups: dict[str, Any] = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig}
    assert {name: list(plain[name]) for name in groups} == {
        name: [field.name for field in dataclasses.fields(config)] for name, config in groups.items()
    }
