"""Mistakes of every kind, up to those that attackers thought of: one sentence, no traceback, and in bounded time."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric  # noqa: F401 # now: its import would count as time of the first test
import pytest
import torch

from reference import checkpoint
from reference.__main__ import LONGEST, main, readable
from reference.cli.yamltext import NODES, load_yaml
from reference.errors import ConfigurationError
from reference.files import SUMS, digest, format_sums, read_file, read_sums
from reference.optimizers import find_class
from tests.reference.commands import SHORT, SMALL, one_error, train, write_data
from tests.sentences import sentence_of

LIMIT = 5.0  # seconds
BOMB = "{a: &a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", {name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data folder, in a working directory of its own from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return str(write_data(Path("data")))


def told(capsys: pytest.CaptureFixture[str], run: Callable[[], int], code: int | None = None) -> str:
    """The sentence that a command ends in."""
    capsys.readouterr()
    began = time.process_time()
    ended = run()
    assert time.process_time() - began < LIMIT
    assert ended in (1, 2) if code is None else ended == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert len(last) < 400
    assert last.isprintable()
    return last.removeprefix("error: ")


# optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        (
            "AdamW",
            "{lr: 1e-3, differentiable: true}",
            "torch.optim.AdamW cannot make a step with --train.optimizer_args",
        ),
        ("AdamW", "{lr: 1e-3, amsgrad: 7}", "torch.optim.AdamW cannot make a step with --train.optimizer_args"),
        ("AdamW", "{lr: x}", "torch.optim.AdamW refused its arguments {'fused': True, 'lr': 'x'}"),
        ("AdamW", "{betas: [0.9]}", "torch.optim.AdamW refused its arguments {'fused': True, 'betas': [0.9]}"),
        ("AdamW", "{1: 2}", "optimizer_args has the key 1, but its keys are names, such as lr."),
        ("SparseAdam", "{lr: 1e-3}", "torch.optim.SparseAdam cannot make a step with --train.optimizer_args"),
        ("bitsandbytes.optim.AdamW8bit", "{optim_bits: 7}", "bitsandbytes.optim.AdamW8bit refused its arguments"),
        ("bitsandbytes.optim.AdamW", "{optim_bits: 7}", "bitsandbytes.optim.AdamW"),
    ],
)
def test_what_an_optimizer_refuses(
    name: str, arguments: str, sentence: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = name if "." in name else f"torch.optim.{name}"
    run = ["--train.optimizer", path, "--train.optimizer_args", arguments]
    assert told(capsys, lambda: train(data, *run), 2).startswith(sentence)
    Path("run.yaml").write_text(f"train: {{optimizer: {path}, optimizer_args: {arguments}}}")
    assert told(capsys, lambda: train(data, "--config", "run.yaml"), 2).startswith(sentence)


def test_an_optimizer_with_modes_that_cannot_step(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of schedulefree, which raise in their first step otherwise."""
    Path("free.py").write_text(
        "import torch\n"
        "class Free(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        raise Exception('Optimizer was not in train mode when step is called.')\n"
        "    def train(self): ...\n"
        "    def eval(self): ...\n"
    )
    run = ["--train.optimizer", "free.Free", "--train.optimizer_args", "{lr: 1}"]
    assert "free.Free cannot make a step with --train.optimizer_args" in told(capsys, lambda: train(data, *run), 2)


# class paths -----------------------------------------------------------------------------------------------------


MODULES = {
    "boom": "__import__('pathlib').Path('ran').touch()\nclass X: ...\nraise KeyError('x')\n",
    "broken": "__import__('pathlib').Path('ran').touch()\ndef f(:\n",
    "ends": "import sys\nclass X: ...\nsys.exit(0)\n",
    "other": "__import__('pathlib').Path('ran').touch()\nclass Y: ...\n",
    "function": "__import__('pathlib').Path('ran').touch()\ndef X(): ...\n",
    "deep": "__import__('pathlib').Path('ran').touch()\nx = " + "(" * 5000 + ")" * 5000,
}


@pytest.mark.parametrize(
    ("path", "sentence", "runs"),
    [
        ("boom.X", "the optimizer 'boom.X' cannot be imported (KeyError: 'x'): install", True),
        ("broken.X", "the optimizer 'broken.X' cannot be imported (SyntaxError: invalid syntax", False),
        ("ends.X", "the optimizer 'ends.X' cannot be imported (SystemExit: 0): install", False),
        ("other.X", "other has no 'X'", False),
        ("function.X", "function.X is not a torch.optim.Optimizer, but a function.", False),
        ("deep.X", "the optimizer 'deep.X' cannot be imported (", False),
        ("antigravity.fly", "antigravity.fly is not an optimizer: antigravity is of Python's standard library.", False),
        ("package.inner.X", "package.inner has no 'X'", False),
        ("package.absent.X", "the optimizer 'package.absent.X' cannot be imported (No module named", True),
        ("a\0.X", "'a\\x00.X' is not a class path", False),
        ("..X", "'..X' is not a class path", False),
        ("torch." * 100 + "X", "'torch.torch.", False),
    ],
)
def test_a_module_is_imported_only_if_it_can_hold_the_class(
    path: str, sentence: str, runs: bool, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in MODULES.items():
        Path(f"{name}.py").write_text(text)
    Path("package").mkdir()
    Path("package/__init__.py").write_text("__import__('pathlib').Path('ran').touch()\n")
    Path("package/inner.py").write_text("__import__('pathlib').Path('ran').touch()\nY = 1\n")
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    monkeypatch.setattr("webbrowser.open", lambda _: Path("ran").touch())
    assert sentence_of(ConfigurationError, lambda: find_class(path)).startswith(sentence)
    assert Path("ran").exists() == runs
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "from torch.optim import SGD as X",
        "from torch.optim import *\nX = SGD",
        "from torch.optim import *",
        "import torch\nif True:\n    class X(torch.optim.SGD): ...",
        "import torch\ntry:\n    X = torch.optim.SGD\nexcept ImportError: ...",
        "def __getattr__(name):\n    import torch\n    return torch.optim.SGD",
        "import torch\ndef decorate(f): return torch.optim.SGD\n@decorate\ndef X(): ...",
    ],
)
def test_every_way_to_hold_a_class_is_known(text: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"holds_{abs(hash(text))}"
    Path(f"{name}.py").write_text(text)
    wanted = "SGD" if text.endswith("import *") else "X"
    assert issubclass(find_class(f"{name}.{wanted}"), torch.optim.SGD)


# numbers ---------------------------------------------------------------------------------------------------------

HUGE = "99999999999999999999"


@pytest.mark.parametrize("value", [HUGE, "9" * 5000, "-" + HUGE])
@pytest.mark.parametrize(
    "option",
    ["model.block_size", "model.vocab_size", "model.n_layer", "model.n_embd", "model.intermediate_size"]
    + [f"train.{name}" for name in ("devices", "num_nodes", "updates", "microbatches", "seed", "evaluate_batches")]
    + ["data.microbatch_size"],
)
def test_huge_numbers(option: str, value: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert option.rpartition(".")[2] in told(capsys, lambda: train(data, f"--{option}={value}"), 2)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--model.n_layer=1000000000", "n_layer is 1000000000, but must be at most 10,000."),
        ("--model.n_embd=1099511627776", "no memory is large enough for the model"),
        ("--data.microbatch_size=1099511627776", "there is not enough memory for the model with microbatches of"),
        ("--train.devices=100000", "devices is 100000, but this machine has"),
    ],
)
def test_numbers_for_which_no_machine_is_large_enough(
    option: str, sentence: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, lambda: train(data, option), 2).startswith(sentence)


def test_more_sequences_at_a_time_than_there_are(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    capsys.readouterr()
    losses = []
    for size in ("3", "1000000", "99999999999"):
        assert main(["evaluate", "--checkpoint", "out/tiny", "--data", data, "--microbatch_size", size]) == 0
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1] == losses[2]


# files and paths -------------------------------------------------------------------------------------------------


def test_what_is_not_a_file_of_settings(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("latin.yaml").write_bytes(b"preset: t\xefny\n")
    Path("long.yaml").write_text("#" * (1 << 17))
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    for option in ("--config", "--train", "--model"):
        for name, sentence in {
            "latin.yaml": "is not UTF-8 text.",
            "long.yaml": "it has 131,072 bytes, but at most 65,536 are allowed",
            "fifo": "it is not a file",
            "/dev/zero": "it is not a file",
            ".": "it is a folder, not a file",
        }.items():
            assert sentence in told(capsys, lambda o=option, n=name: train(data, o, n), 2)  # type: ignore[misc] # a default
    assert "Too many levels of symbolic links" in told(capsys, lambda: train(data, "--config", "loop"), 2)


@pytest.mark.parametrize(
    "words",
    [
        "train --directory NUL",
        "train --data.path NUL",
        "train --resume NUL",
        "train --config NUL",
        "train --train NUL",
        "train --config nul.yaml",
        "prepare --text NUL --out p",
        "prepare --text a.txt --out NUL",
        "prepare --text a.txt --out p --tokenizer NUL",
        "generate --checkpoint NUL",
        "evaluate --checkpoint NUL --data data",
        "export --checkpoint data --out NUL",
        "import --from NUL --out i",
    ],
)
def test_a_nul_in_a_name(words: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("nul.yaml").write_text('directory: "a\\0b"\n')
    Path("a.txt").write_text("text\n" * 9)
    told(capsys, lambda: main(["a\0b" if word == "NUL" else word for word in words.split()]))
    assert sorted(os.listdir()) == ["a.txt", "data", "nul.yaml"]


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "loop", "loop/in"])
def test_names_that_no_file_can_have(name: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loop").symlink_to("loop")
    Path("a.txt").write_text("text\n" * 9)
    for words in (
        ["train", "--directory", name, "--data.path", data, *SMALL, *SHORT],
        ["train", "--data.path", name],
        ["train", "--resume", name],
        ["prepare", "--text", name, "--out", "p"],
        ["prepare", "--text", "a.txt", "--out", name],
        ["prepare", "--text", "a.txt", "--out", "p", "--tokenizer", name],
        ["generate", "--checkpoint", name],
        ["import", "--from", name, "--out", "i"],
    ):
        told(capsys, lambda words=words: main(words))  # type: ignore[misc] # a default


def test_links_and_pipes_among_the_text(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text").mkdir()
    Path("text/a.txt").write_text("some text\n" * 50)
    Path("text/self").symlink_to(".")
    Path("text/loop").symlink_to("loop")
    os.mkfifo("text/fifo")
    assert main(["prepare", "--text", "text", "--out", "out"]) == 0
    assert "1 text file," in capsys.readouterr().out
    assert main(["prepare", "--text", "text/a.txt", "text/fifo", "/dev/zero", "--out", "out"]) == 0
    assert "left out: 2 files (not a file)" in capsys.readouterr().out
    assert main(["prepare", "--text", "text/**/**/**/*.txt", "--out", "out"]) == 0


# nesting, aliases and size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (BOMB + "}", "has more than 10,000 values: settings have about fifty."),
        ("[" * 5000 + "]" * 5000, "is nested deeper than 32 levels"),
        ("{a: " * 5000, "is nested deeper than 32 levels"),
        ("- " * 5000, "is nested deeper than 32 levels"),
        ("&a [*a]", "refers to *a before its definition ends"),
        ("[" + "x, " * 40_000 + "]", "characters, but settings have at most 65,536."),
        ("[" + "x, " * NODES + "]", "has more than 10,000 values"),
    ],
)
def test_yaml_is_read_in_bounded_time(text: str, sentence: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--train.optimizer_args", "--train.optimizer_args.lr", "--train.seed", "--data.microbatch_size"):
        message = told(capsys, lambda o=option: train(data, o, text), 2)  # type: ignore[misc] # a default
        assert sentence in message
        assert message.startswith(option)
    if len(text) < 1 << 16:
        Path("run.yaml").write_text(f"train: {{optimizer_args: {text}" if text[0] != "-" else text)
        assert sentence in told(capsys, lambda: train(data, "--config", "run.yaml"), 2)


def test_aliases_that_are_small_are_read() -> None:
    assert load_yaml("{a: &x [1, 2], b: *x}", "it") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text", ["train: !!python/object/apply:os.system ['touch ran']", "directory: !!binary aGVsbG8="]
)
def test_yaml_holds_no_code(text: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(text)
    told(capsys, lambda: train(data, "--config", "run.yaml"), 2)
    assert not Path("ran").exists()


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and write its new checksum too."""
    (folder / name).write_bytes(content)
    sums = {path.name: digest(path) for path in folder.iterdir() if path.name != SUMS}
    (folder / SUMS).write_bytes(format_sums(sums))


WRONG: list[Any] = [None]
LATER: list[Any] = [-1, "../../etc/passwd", [[1]], 1 << 70, 1.5, "x", "x" * 300, True, [], {}, "a\0b"]
WRONG += [pytest.param(value, marks=pytest.mark.slow) for value in LATER]


@pytest.mark.parametrize("value", [*WRONG, float("nan")], ids=lambda value: repr(value)[:12])
def test_a_sidecar_with_forged_sums(value: Any, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    original = json.loads(Path(data, "train.json").read_bytes())
    for key in [key for key in original if original[key] != value]:
        forge(Path(data), "train.json", json.dumps(original | {key: value}).encode())
        if key not in ("documents", "tokenizer", "checksum"):  # what no run depends on may be anything of its type
            told(capsys, lambda: train(data, "--directory", "out/forged"))
        else:
            main(["train", "--data.path", data, *SMALL, *SHORT, "--directory", f"out/{key}"])
    for content in (
        b"[" * 100_000,
        b"{}",
        b"[]",
        b"\xff",
        b"1" * 5000,
        b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}",
    ):
        forge(Path(data), "train.json", content)
        told(capsys, lambda: train(data, "--directory", "out/forged"), 1)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_the_config_of_a_checkpoint_with_forged_sums(value: Any, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    folder = Path("out/tiny/step-00000004")
    original = json.loads((folder / "config.json").read_bytes())
    flat = [(key,) for key in original] + [("model", key) for key in original["model"]]
    commands = [["generate", "--tokens", "2"], ["evaluate", "--data", data]]
    for number, keys in enumerate(flat):
        changed = json.loads(json.dumps(original))
        target = changed if len(keys) == 1 else changed["model"]
        if target[keys[-1]] == value:
            continue
        target[keys[-1]] = value
        forge(folder, "config.json", json.dumps(changed).encode())
        for words in commands if value is None else [commands[number % 2]]:  # each value meets both, by turns
            began = time.process_time()
            assert main([*words, "--checkpoint", str(folder)]) in (0, 1, 2)
            assert time.process_time() - began < LIMIT
        assert all(len(line) < 400 for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_the_state_of_a_checkpoint_with_forged_sums(value: Any, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--train.updates", "6") == 0
    folder = Path("out/tiny/step-00000004")
    original = torch.load(folder / "state.pt", weights_only=True)
    places: list[list[Any]] = [[key] for key in original]
    places += [["optimizer", key] for key in original["optimizer"]]
    places += [["optimizer", "param_groups", 0, key] for key in original["optimizer"]["param_groups"][0]]
    places += [["optimizer", "state", 0, key] for key in original["optimizer"]["state"][0]]
    for number, keys in enumerate(places):
        changed = torch.load(folder / "state.pt", weights_only=True)
        target = changed
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value
        torch.save(changed, "state.pt")
        forge(folder, "state.pt", Path("state.pt").read_bytes())
        began = time.process_time()
        more = ["--train.updates", "6", "--directory", f"out/{number}", "--resume", str(folder)]
        assert train(data, *more) in (0, 1, 2)
        assert time.process_time() - began < LIMIT
        torch.save(original, "state.pt")
        forge(folder, "state.pt", Path("state.pt").read_bytes())
    assert all(len(line) < 400 for line in capsys.readouterr().err.splitlines())


def test_checksums_name_files_of_their_folder_only(tmp_path: Path) -> None:
    names = ["a.txt", "../b", "/etc/passwd", "x" * 300, "a\0b", "ü" * 200, ""]
    (tmp_path / SUMS).write_bytes(format_sums(dict.fromkeys(names, "0")))
    assert read_sums(tmp_path) == {"a.txt": "0"}
    (tmp_path / SUMS).unlink()
    os.mkfifo(tmp_path / SUMS)
    assert read_sums(tmp_path) is None
    assert not checkpoint.checkpoints(tmp_path)


# what is printed -------------------------------------------------------------------------------------------------


def test_a_message_is_one_short_line_that_does_nothing_to_a_terminal() -> None:
    assert readable("a\n b\tc") == "a b c"
    assert readable("\x1b[31mred\x07 ü") == "\\x1b[31mred\\x07 ü"
    long = readable("begins " + "x" * 5000 + " and ends.")
    assert len(long) <= LONGEST
    assert long.startswith("begins x")
    assert long.endswith("x and ends.")


def test_read_file_says_what_it_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, but at most 4 are allowed"):
        read_file(tmp_path / "a", 4)


def test_what_is_missing_is_told(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model.n_layer", "null"]) == 2
    assert one_error(capsys) == "n_layer is None, but must be a whole number."
