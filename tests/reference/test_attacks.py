"""What was found by hand: odd names and values, optimizers of users' own, and output that nobody reads.

Each is one sentence that names the setting, or a success that loses nothing.
"""

import errno
import io
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.fabric  # noqa: F401 # now: its import would count as time of the first test
import pytest
import yaml  # type: ignore[import-untyped] # no types come with it
from rich.console import Console

from reference import checkpoint
from reference.__main__ import main
from reference.cli.progress import logging_to
from reference.errors import first_line, printable, quoted
from reference.training.stopping import stop_on_signals
from tests.reference.commands import SHORT, SMALL, TEXT, one_error, train, write_data


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data folder, in a working directory of its own from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return str(write_data(Path("data")))


def told(capsys: pytest.CaptureFixture[str], run: Callable[[], int]) -> str:
    """The sentence that a command ends in."""
    capsys.readouterr()
    assert run() in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert len(last) < 400
    assert last.isprintable()
    return last.removeprefix("error: ")


# names -----------------------------------------------------------------------------------------------------------


def test_a_pipe_in_place_of_a_folder_is_not_waited_for(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    for words in (
        ["train", "--init_from", "pipe"],
        ["train", "--resume", "pipe"],
        ["train", "--directory", "pipe", "--resume", "auto", "--data.path", data, *SMALL, *SHORT],
        ["generate", "--checkpoint", "pipe"],
        ["evaluate", "--checkpoint", "pipe", "--data", data],
        ["export", "--checkpoint", "pipe", "--out", "out"],
    ):
        assert "pipe" in told(capsys, lambda words=words: main(words))  # type: ignore[misc] # a default


@pytest.mark.parametrize("option", ["--init_from", "--resume", "--data.path", "--data.stream", "--directory"])
def test_an_empty_name_is_not_the_current_folder(option: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in told(capsys, lambda: train(data, option, ""))
    assert os.listdir() == ["data"]


def test_a_nul_in_the_name_of_weights(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, lambda: main(["train", "--init_from", "a\0b"])).startswith("--init_from is 'a\\x00b', but")


def test_names_that_are_no_text(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a name that are not UTF-8 come as lone surrogates, which neither torch nor a terminal takes."""
    odd = os.fsdecode(b"odd\xff")
    Path("a.txt").write_bytes(TEXT)
    assert main(["prepare", "--text", "a.txt", "--out", odd]) == 0
    assert "odd\\udcff: 1 text file," in capsys.readouterr().out
    assert train(data, "--directory", "run") == 0
    assert main(["export", "--checkpoint", "run", "--out", f"{odd}/theirs"]) == 0
    assert "Written: odd\\udcff/theirs" in capsys.readouterr().out
    shutil.copytree("run", f"{odd}/run")
    for words in (
        ["generate", "--checkpoint", f"{odd}/run"],
        ["import", "--from", f"{odd}/theirs", "--out", "ours"],
        ["import", "--from", "theirs", "--out", odd],
    ):
        shutil.copytree(f"{odd}/theirs", "theirs", dirs_exist_ok=True)
        sentence = told(capsys, lambda words=words: main(words))  # type: ignore[misc] # a default
        assert "is not UTF-8, and torch cannot read files there" in sentence


def test_a_checkpoint_that_lacks_a_file(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--directory", "run") == 0
    os.remove("run/step-00000004/state.pt")
    sentence = told(capsys, lambda: main(["generate", "--checkpoint", "run/step-00000004"]))
    assert sentence.startswith("run/step-00000004 is not a whole checkpoint, because it lacks state.pt: ")
    assert train(data, "--directory", "run", "--resume", "auto") == 0
    assert "run/step-00000004 is passed over, because it lacks state.pt" in capsys.readouterr().err


def test_a_folder_without_tokenizer_is_told_as_one(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text").mkdir()
    Path("text/a.txt").write_bytes(TEXT)
    prepare = ["prepare", "--text", "text", "--out", "out", "--tokenizer"]
    assert told(capsys, lambda: main([*prepare, "text"])).startswith("there is no tokenizer at text (text/tokenizer")
    assert "--end-of-document is empty" in told(capsys, lambda: main([*prepare, "text", "--end-of-document", ""]))
    sentence = told(capsys, lambda: train("nowhere", "--data.stream", "text"))
    assert sentence.startswith("there is no data in nowhere: write it with `python -m reference prepare")


# values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["!!timestamp x", "!!float x", "!!int x", "!!bool x", "._", "!!timestamp 2020-99-99", "!!int 0b2"]
)
def test_yaml_of_which_nothing_can_be_made_names_its_setting(
    value: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = told(capsys, lambda: train(data, "--train.optimizer_args", f"{{lr: {value}}}"))
    assert sentence.startswith(f"--train.optimizer_args is '{{lr: {value}}}', which cannot be read (")
    Path("run.yaml").write_text(f"train: {{optimizer_args: {{lr: {value}}}}}")
    sentence = told(capsys, lambda: train(data, "--config", "run.yaml"))
    assert sentence.startswith("the configuration file run.yaml holds a value that cannot be read: ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("resume: [1]", "resume is [1], but must be true or false or text."),
        ("data: {stream: 3}", "stream is 3, but must be text or null (None)."),
        ("directory: {a: 1}", "directory is {'a': 1}, but must be text."),
        ("model: {norm: 3}", "norm is 3, but must be one of 'layernorm', 'rmsnorm'."),
        ("tensorboard: 3", "tensorboard is 3, but must be true or false."),
        ("wandb: [x]", "wandb is ['x'], but must be text or null (None)."),
        ("preset: 3", "preset is 3, but must be text."),
    ],
)
def test_a_value_of_a_wrong_type_in_a_file(
    content: str, sentence: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(content)
    assert main(["train", "--config", "run.yaml"]) == 2
    assert one_error(capsys) == sentence


# optimizers of a user's own --------------------------------------------------------------------------------------

BASE = "import sys, torch\nclass Own(torch.optim.SGD):\n    "


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def state_dict(self): raise RuntimeError('no')", "because its state_dict() failed (RuntimeError: no)"),
        ("def zero_grad(self, *a, **k): 1 / 0", "because its zero_grad() failed (ZeroDivisionError: division by zero)"),
        ("def __init__(self, *a, **k): sys.exit(3)", "because its __init__() failed (SystemExit: 3)"),
        ("def step(self, closure=None): sys.exit(7)", "cannot make a step with --train.optimizer_args"),
        ("step = 7", "has no method step()"),
        ("def train(self): 1 / 0\n    def eval(self): ...", "because its train() failed (ZeroDivisionError"),
        ("def train(self): ...\n    def eval(self): raise KeyError('x')", "because its eval() failed (KeyError: 'x')"),
        ("def __init__(self, p, lr): super().__init__(p, lr); self.param_groups = []", "keeps no lr in its parameter"),
    ],
)
def test_whatever_an_optimizer_of_a_user_raises_is_told(
    body: str, sentence: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"own_{abs(hash(body))}"
    Path(f"{name}.py").write_text(BASE + body)
    run = ["--train.optimizer", f"{name}.Own", "--train.optimizer_args", "{lr: 0.1}"]
    said = told(capsys, lambda: train(data, *run))
    assert said.startswith(f"{name}.Own ")
    assert sentence in said


# weights and data that do not belong together --------------------------------------------------------------------


def byte_pairs(folder: str) -> None:
    Path("a.txt").write_bytes(TEXT * 9)
    assert main(["prepare", "--text", "a.txt", "--tokenizer", "bpe:257", "--out", folder]) == 0


def test_weights_and_data_of_different_tokenizers(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--directory", "run") == 0
    byte_pairs("pairs")
    run = ["train", "--init_from", "run", "--updates=2", "--directory", "tuned", "--data"]
    assert "prepare the text with --tokenizer bytes" in told(capsys, lambda: main([*run, "pairs"]))
    assert main([*run, data]) == 0


def test_a_tokenizer_with_more_special_tokens_is_the_same(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the tokenizer of a chat model, beside that of its base."""
    byte_pairs("pairs")
    shape = ["--model.vocab_size", "270"]
    assert train("pairs", "--directory", "base", *shape) == 0
    content = json.loads(Path("pairs/tokenizer.json").read_bytes())
    more = {"id": 257, "content": "<|im_start|>", "special": True, "single_word": False}
    more |= {"lstrip": False, "rstrip": False, "normalized": False}
    for name, changed in (
        ("chat", content | {"added_tokens": [*content["added_tokens"], more]}),
        ("other", content | {"model": content["model"] | {"vocab": shifted(content["model"]["vocab"])}}),
    ):
        Path(f"{name}.json").write_text(json.dumps(changed))
        assert main(["prepare", "--text", "a.txt", "--tokenizer", f"{name}.json", "--out", name]) == 0
    run = ["train", "--init_from", "base", "--updates=2", "--data"]
    assert main([*run, "chat", "--directory", "tuned"]) == 0
    assert "other than that of the data in other (tokenizer.json), so" in told(
        capsys, lambda: main([*run, "other", "--directory", "more"])
    )


def shifted(vocabulary: dict[str, int]) -> dict[str, int]:
    """A vocabulary in which two tokens have changed places."""
    return vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}


def test_adapters_beside_random_weights_are_refused(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, lambda: train(data, "--lora_rank", "2")).startswith("lora_rank trains adapters beside weights")


# output ----------------------------------------------------------------------------------------------------------


class Unwritable(io.StringIO):
    """A stderr on a disk that is full, or behind a terminal that is gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "gone"), BrokenPipeError()])
def test_a_log_that_cannot_be_written_costs_no_checkpoint(
    error: OSError, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Unwritable(error))
    assert train(data, "--directory", "run") == 0
    assert [path.name for path in checkpoint.checkpoints(Path("run"))] == ["step-00000002", "step-00000004"]


def test_what_is_logged_does_nothing_to_a_terminal() -> None:
    shown = io.StringIO()
    with logging_to(Console(file=shown)):
        logging.getLogger("reference").warning("a \x1b[31mred\udcff name\nand another line")
    assert shown.getvalue() == "warning: a \\x1b[31mred\\udcff name\nand another line\n"


def test_names_in_suggestions_can_be_pasted() -> None:
    assert quoted(Path("a b'c")) == "'a b'\"'\"'c'"
    assert quoted("out/tiny") == "out/tiny"
    assert quoted("a\nb") == "'a\\nb'"
    assert printable("ü\n\x07") == "ü\n\\x07"


def test_an_error_of_the_system_is_told_without_its_number() -> None:
    assert first_line(OSError(errno.ENOSPC, "No space left on device", "/a/b")) == "No space left on device"


# signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(
    data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(*_: object) -> None:
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr("reference.cli.train.settings_writer", lambda _: hang_up)
    assert train(data, "--directory", "run", "--train.save_every", "100") == 128 + signal.SIGHUP
    assert len(checkpoint.checkpoints(Path("run"))) == 1
    assert "stopped by SIGHUP" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_run_under_nohup_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_files_of_settings_are_written_as_they_are_read(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The stricter types of files refuse nothing that ``--print_config`` prints."""
    assert main(["train", "--lora_rank", "2", "--tensorboard", "--resume", "auto", "--print_config"]) == 0
    content = capsys.readouterr().out
    Path("run.yaml").write_text(content)
    assert main(["train", "--config", "run.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(content)
