"""The settings of python -m reference: presets, files and options, and what is wrong with them."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # no types come with it

from reference.__main__ import COMMANDS, main
from reference.cli.everyday import SHORT
from reference.cli.presets import PRESETS
from reference.cli.settings import Settings, read_settings
from reference.config import DataConfig, GPTConfig, TrainConfig
from tests.reference.commands import one_error


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
        ("trian", "there is no command 'trian': did you mean train?"),
        ("train --beta 3", "there is no option '--beta': did you mean --train.optimizer_args.betas?"),
        ("train --out X", "there is no option '--out': did you mean --directory?"),
        ("train --learning-rate 3", "there is no option '--learning_rate': did you mean --lr?"),
        ("train --max_steps 3", "there is no option '--max_steps': did you mean --updates?"),
        ("train --lrr 3", "there is no option '--lrr': did you mean --lr?"),
        ("train --microbatchsize 3", "there is no option '--microbatchsize': did you mean --microbatch_size?"),
        ("train --min_lr 3", "there is no option '--min_lr': did you mean --train.min_lr?"),
        ("train --updates many", "updates is 'many', but must be a whole number."),
        ("train --updates 3 --warmup 20", "warmup is 20, but must lie between 0 and updates (3)."),
        ("train --help optimizer", "--help has no topic 'optimizer': choose one of all, model, train, data, finetune."),
        ("train --train.updats=3", "there is no option '--train.updats': did you mean --train.updates?"),
        ("train --model.n_layr 3", "there is no option '--model.n_layr': did you mean --model.n_layer?"),
        ("train --train.upd 3", "there is no option '--train.upd': did you mean --train.updates?"),  # no abbreviations
        ("train --frobnicate", "there is no option '--frobnicate': see python -m reference train --help."),
        ("train --preset gpt2-124", "there is no preset 'gpt2-124': did you mean gpt2-124m"),
        ("train --preset", "argument --preset: expected one argument."),
        ("train --model.n_layer 3.5", "n_layer is 3.5, but must be a whole number."),
        ("train --train.min_lr None", "min_lr is 'None', but must be a number or null (None)."),
        ("train --train.compile 1", "compile is 1, but must be true or false."),
        (
            "train --train.optimizer_args 3",
            "optimizer_args is 3, but must be a mapping, such as {lr: 3e-4}.",
        ),
        ("train --train run.yaml", "train in --train is 'run.yaml', but must be a mapping of settings; "),
        ("train --train.capture_step true", "capture_step is True, but it was removed, because a captured step saved"),
        ("train --train.seed -1", "seed is -1, but must lie between 0 and 2**32 - 1."),
        ("train --train.min_lr -1", "min_lr is -1: give a rate of at least 0, or None for a tenth of lr."),
        ("train --directory=", "--directory is empty: give a folder, for example out/tiny."),
        ("export --checkpoint x --out=", "--out: the name is empty."),
        ("train --data.microbatch_size 0", "microbatch_size is 0, but must be at least 1."),
        (
            "train --config missing.yaml",
            "the configuration file missing.yaml cannot be read: No such file or directory.",
        ),
        ("generate", "--checkpoint must be given: see --help."),
        ("generate --chekpoint x", "there is no option '--chekpoint': did you mean --checkpoint?"),
        ("generate --checkpoint x --top_k two", "top_k is 'two', but must be a whole number or null (None)."),
        ("export --format onnx --checkpoint x --out y", "format is 'onnx', but must be one of 'huggingface', 'peft'."),
        ("prepare --text x", "--text needs --out, the folder to write to, for example --out data/mine."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert one_error(capsys).startswith(message)


@pytest.mark.parametrize("arguments", ["train now", "generate --checkpoint x now"])
def test_a_word_that_belongs_to_no_option_is_one_sentence(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert one_error(capsys).lower() == "unrecognized arguments: now."  # upper case in jsonargparse 4.41, lower in 4.53


def test_a_value_that_is_no_choice_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model.norm", "rms"]) == 2
    assert one_error(capsys) == "norm is 'rms', but must be one of 'layernorm', 'rmsnorm'."


def test_a_group_may_be_given_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("{n_layer: 3, norm_eps: 1e-6}")
    settings = read_settings(["--model", str(file), "--train", "{updates: 7, warmup: 1}", "--train.warmup", "2"])
    assert (settings.model.n_layer, settings.model.norm_eps) == (3, 1e-6)
    assert (settings.train.updates, settings.train.warmup) == (7, 2)


def test_settings_of_the_first_release_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It wrote ``capture_step``, which is gone."""
    file = tmp_path / "config.yaml"
    file.write_text("train: {capture_step: false, updates: 50}\n")
    assert read_settings(["--config", str(file), "--train.capture_step", "false"]).train.updates == 50
    file.write_text("train: {capture_step: true}\n")
    assert main(["train", "--config", str(file)]) == 2
    assert one_error(capsys).startswith("capture_step is True, but it was removed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {n_layer: 2\n", "is not valid YAML at line 2, column 1: "),
        ("model:\n  n_layr: 2\n", "has the unknown name 'model.n_layr': did you mean model.n_layer?"),
        ("modle:\n  n_layer: 2\n", "has the unknown name 'modle': did you mean model?"),
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
    assert one_error(capsys) == "n_layer is 'two', but must be a whole number."


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
        main(["train", "--preset", "llama-1.2b", "--help", "all"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Longest sequence, in tokens, that the model can see. (a whole number; default: 2048)" in printed
    assert "e.g. bitsandbytes.optim.AdamW8bit" in printed
    assert all(preset.about in printed for preset in PRESETS.values())


def printed_help(*words: str) -> str:
    """Standard output of ``train --help``, as one line."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
        main(["train", *words])
    return " ".join(out.getvalue().split())


def test_help_of_train_begins_with_what_everybody_sets() -> None:
    printed = printed_help("--preset", "llama-1.2b", "--help")
    assert "--lr VALUE Peak learning rate (default: 0.0002)" in printed
    assert "e.g. bitsandbytes.optim.AdamW8bit or" in printed
    assert all(f"--{short} " in printed for short in SHORT)
    assert "--model.norm_eps" not in printed
    assert all(preset.about in printed for preset in PRESETS.values())


def test_help_of_a_group() -> None:
    printed = printed_help("--help", "model", "--block_size", "7")
    assert "--model.norm_eps" in printed
    assert "--train.updates" not in printed


@pytest.mark.parametrize("short", SHORT)
def test_a_short_name_is_the_long_one(short: str) -> None:
    value = {"precision": "bf16-mixed", "optimizer": "torch.optim.SGD", "compile": "true"}.get(short, "2")
    given = read_settings([f"--{short.replace('_', '-')}", value])
    assert given == read_settings([f"--{SHORT[short]}={value}"])
    assert given != read_settings([])


def test_data_is_a_folder_or_a_group(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("{microbatch_size: 3}")
    assert read_settings(["--data", "data/mine"]).data == DataConfig(path="data/mine", microbatch_size=16)
    assert read_settings([f"--data={tmp_path}"]).data.path == str(tmp_path)
    assert read_settings(["--data", str(file)]).data.microbatch_size == 3
    assert read_settings(["--data", "{microbatch_size: 4}", "--data", "there"]).data == DataConfig(
        path="there", microbatch_size=4
    )


@pytest.mark.parametrize(("updates", "warmup"), [(3, 0), (10, 2), (100, 20), (600, 20), (5000, 20)])
def test_a_warm_up_that_was_not_given_fits_the_run(updates: int, warmup: int, tmp_path: Path) -> None:
    assert read_settings(["--updates", str(updates)]).train.warmup == warmup
    file = tmp_path / "run.yaml"
    file.write_text("train: {warmup: 3}")
    assert read_settings(["--updates", str(updates), "--config", str(file)]).train.warmup == 3
    assert read_settings(["--updates", str(updates), "--warmup", "1"]).train.warmup == 1


def test_no_command_is_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


def test_every_field_can_be_given_in_a_file(tmp_path: Path) -> None:
    plain = read_settings([]).plain()
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(plain))
    assert read_settings(["--config", str(file)]).plain() == plain
    groups: dict[str, Any] = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig}
    assert {name: list(plain[name]) for name in groups} == {
        name: [field.name for field in dataclasses.fields(config)] for name, config in groups.items()
    }


def test_muon_leaves_the_presets_arguments_to_adamw(tmp_path: Path) -> None:
    preset = read_settings([]).train.optimizer_args
    train = read_settings(["--optimizer", "torch.optim.Muon", "--lr", "0.01"]).train
    assert (train.optimizer_args, train.optimizer_rest_args) == ({"lr": 0.01, "weight_decay": 0.1}, preset)
    (tmp_path / "run.yaml").write_text("train: {optimizer: torch.optim.Muon, optimizer_rest_args: {lr: 1}}")
    train = read_settings(["--config", str(tmp_path / "run.yaml")]).train
    assert (train.optimizer_args["lr"], train.optimizer_rest_args) == (0.02, {"lr": 1})
    train = read_settings(["--optimizer", "torch.optim.Muon", "--train.optimizer_args", "{lr: 0.1}"]).train
    assert (train.optimizer_args, train.optimizer_rest_args) == ({"lr": 0.1}, {})
