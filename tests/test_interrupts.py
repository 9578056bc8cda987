"""Ctrl-C while a command is still being imported is one sentence and exit code 130, as later."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conformance import interrupts as of_the_judge
from reference import interrupts as of_the_trainer

COMMANDS = {
    "reference": (["-m", "reference", "train"], "Stopped at once."),
    "conformance": (["-m", "conformance", "list"], "Interrupted."),
    "conformance.bench": (["-m", "conformance.bench", "--help"], "Interrupted."),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_during_the_first_imports(name: str, tmp_path: Path) -> None:
    words, sentence = COMMANDS[name]
    command = [sys.executable, "-X", "importtime", *words]  # which tells on stderr what was imported
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        for line in started.stderr:
            if line.rstrip().endswith(f"{name.partition('.')[0]}.interrupts"):
                started.send_signal(signal.SIGINT)
                break
        told = [line.rstrip() for line in started.stderr if not line.startswith("import time:")]
    assert (started.returncode, told) == (130, [sentence])


@pytest.mark.parametrize(("package", "module"), [("reference", of_the_trainer), ("conformance", of_the_judge)])
@pytest.mark.parametrize(
    ("arguments", "original", "expected"),
    [
        (["-m", "train"], ["python", "-m", "{}", "train"], True),
        (["-m", "train"], ["python", "-X", "dev", "-m", "{}.bench", "train"], True),
        (["-m"], ["python", "-m{}"], True),
        (["/usr/bin/gpt-{}"], ["python", "/usr/bin/gpt-{}"], True),
        (["-m", "{}"], ["python", "-m", "theirs", "{}"], False),
        (["train.py"], ["python", "train.py"], False),
        (["-c"], ["python", "-c", "import {}"], False),
        ([], ["python"], False),
    ],
)
def test_only_a_command_changes_how_errors_are_shown(
    package: str,
    module: object,
    arguments: list[str],
    original: list[str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [word.format(package) for word in arguments])
    monkeypatch.setattr(sys, "orig_argv", [word.format(package) for word in original])
    assert vars(module)["is_command"]() is expected


def test_other_errors_are_shown_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("x")
    of_the_trainer.tell(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: x\n"
