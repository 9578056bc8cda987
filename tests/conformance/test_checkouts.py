"""Subjects that are a checkout: one sentence where there is none; judged where there is one."""

import os
import subprocess
from pathlib import Path

import pytest

from conformance.clause import catalogue
from conformance.errors import UsageError
from conformance.loading import load_subject
from conformance.session import Session
from conformance.subjects.checkout import checkout, commit

CHECKOUTS = {"nanogpt": ("NANOGPT", "train.py"), "nanochat": ("NANOCHAT", "scripts/base_train.py")}


def require_packages(name: str) -> None:
    for package in {"nanochat": ("pyarrow", "tiktoken", "wandb")}.get(name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize("name", CHECKOUTS)
def test_says_what_to_set(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variable, script = CHECKOUTS[name]
    require_packages(name)
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match=rf"^the environment variable {variable} is not set: clone github.com/.*\.$"):
        load_subject(name)
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UsageError, match=rf"^{variable} is .*, which has no file {script}: clone"):
        load_subject(name)


def test_takes_the_folder_and_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("THERE", str(tmp_path))
    found = checkout("THERE", "github.com/a/b", "train.py")
    assert found == tmp_path
    assert commit(found) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "--quiet"], ["add", "train.py"], ["commit", "--quiet", "--message", "a"]):
        subprocess.run([*git, *arguments], check=True)
    whole = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert whole.startswith(commit(found))


@pytest.mark.parametrize("name", CHECKOUTS)
def test_judges_a_checkout(name: str) -> None:
    if not os.environ.get(CHECKOUTS[name][0]):
        pytest.skip(f"{CHECKOUTS[name][0]} names no checkout")
    require_packages(name)
    with Session(load_subject(name)) as session:
        results = [session.judge(catalogue()[key]) for key in ("INIT-2", "DECAY-1", "LR-1", "DATA-6", "EVAL-3")]
    assert [result.outcome for result in results] == ["pass"] * 5, results
