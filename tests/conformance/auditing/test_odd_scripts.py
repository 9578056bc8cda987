"""Scripts that end or move the process in odd ways: the audit still says what it saw, where it was asked to."""

import errno
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conformance import cli
from conformance.__main__ import entry
from conformance.auditing.run import audited
from tests.conformance.auditing.loop import SCRIPT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    os.chdir(tmp_path)


def write(deed: str, name: str = "train.py") -> str:
    """The loop of the tests, which does something more after its third update."""
    before, line, after = SCRIPT.partition('    print(f"step {step} loss')
    assert line
    Path(name).write_text(f"import os, sys\n{before}    if step == 2:\n        {deed}\n{line}{after}")
    return name


def test_a_script_that_ends_its_process_is_judged_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "--report", "r.json", "--", write("os._exit(4)")]) == 4
    assert Path("r.json").exists()
    assert "Result: " in capfd.readouterr().err
    assert cli.main(["audit", "--", write("os._exit(0)")]) == 0
    assert "Result: " in capfd.readouterr().err


def test_what_a_child_process_ends_is_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    script = write("os.waitpid(os.fork() or os._exit(7), 0)")
    assert cli.main(["audit", "--", script]) == 0
    assert capfd.readouterr().err.count("Result: ") == 1


def test_a_script_that_empties_its_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", "--", write("sys.argv.clear()")]) == 0
    error = capfd.readouterr().err
    assert "Result: " in error
    assert "Traceback" not in error


def test_a_script_that_goes_elsewhere_takes_no_file_along(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = write("os.chdir('../elsewhere')")
    assert cli.main(["audit", "--trace", "trace", "--report", "r.json", "--page", "p.html", "--", script]) == 0
    os.chdir(folder / "here")
    assert cli.main(["new-adapter", script]) == 0
    os.chdir(folder / "here")
    assert {"trace", "r.json", "p.html", "train_adapter.py"} < set(os.listdir())
    assert os.listdir("trace") == ["process-0.pt"]
    assert os.listdir("../elsewhere") == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_record_that_the_disk_does_not_take(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904 # as torch does

    script = write("pass")
    monkeypatch.setattr(torch, "save", full)
    assert cli.main(["audit", "--trace", "trace", "--", script]) == 2
    assert f"could not be written to {Path('trace').absolute()}: {os.strerror(errno.ENOSPC)}." in capfd.readouterr().err
    assert os.listdir("trace") == []


def test_a_record_that_holds_code_is_refused_without_advice_to_run_it(capfd: pytest.CaptureFixture[str]) -> None:
    Path("record").mkdir()
    Path("record/process-0.pt").write_bytes(pickle.dumps(print, protocol=4))
    assert cli.main(["diff", "record", "record"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "it is damaged, or holds more than tensors and values" in line
    assert "weights_only" not in line


def test_names_that_are_no_text(capfd: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"odd\xff")
    assert cli.main(["run", "--clause=DECAY-1", f"--report={odd}.json"]) == 0
    assert cli.main(["report", f"{odd}.json", "--out", odd]) == 0
    assert cli.main(["audit", "--trace", odd, "--report", f"{odd}.json", "--", write("pass", f"{odd}.py")]) == 0
    assert cli.main(["diff", odd, odd]) == 0
    printed = capfd.readouterr()
    assert "Written: odd\\udcff/index.html" in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "content", [b"x = 1\0", b"\xff\xfe", b"def f(:", b"(" * 9000], ids=lambda text: ascii(text[:6])
)
def test_what_is_not_python_is_told(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    Path("train.py").write_bytes(content)
    assert cli.main(["audit", "--", "train.py"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("The script train.py")
    assert "is not Python: " in line
    assert len(line) < 400


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_the_shell_has_closed(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = write("pass")
    monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["conformance", "audit", "--report", "r.json", "--", script])
    assert entry() == 0
    getattr(sys, name).close()  # the null device that it was given
    assert Path("r.json").exists()
    monkeypatch.setattr(sys, name, None)
    with audited():
        print("nobody reads this")


@pytest.mark.parametrize("command", [["audit", "--", "train.py"], ["new-adapter", "train.py"]])
def test_ctrl_c_is_one_sentence(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    write("raise KeyboardInterrupt")
    assert cli.main(command) == 130
    error = capfd.readouterr().err
    assert error.splitlines().count("Interrupted.") == 1
    assert "Traceback" not in error
    assert not Path("train_adapter.py").exists()
