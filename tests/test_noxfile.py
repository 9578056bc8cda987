"""What the noxfile does beside installing, and the snippet for CI in docs/adapters.md. nox itself is not needed."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # PyYAML has no types of its own

from conformance.cli import main

ROOT = Path(__file__).parent.parent


def session_decorator(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Return what nox.session and nox.parametrize return, without nox: the function itself."""
    return function if function is not None else lambda decorated: decorated


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module noxfile.py."""
    stand_in: Any = ModuleType("nox")
    stand_in.session, stand_in.parametrize = session_decorator, lambda *_, **__: session_decorator
    stand_in.options, stand_in.Session = SimpleNamespace(), object
    monkeypatch.setitem(sys.modules, "nox", stand_in)
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ([], "reference.json"),
        (["--subject", "litgpt"], "litgpt.json"),
        (["--subject=my.module:Adapter", "--clause", "INIT-1"], "my.module-Adapter.json"),
    ],
)
def test_each_subject_has_a_report_of_its_own(
    noxfile: ModuleType, given: list[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(noxfile, "LATEST", tmp_path / "latest")
    monkeypatch.setattr(noxfile, "run_to_its_result", lambda _, *arguments: seen.extend(arguments))
    noxfile.conformance(SimpleNamespace(posargs=given))
    assert seen[-2] == "--report"
    assert (Path.cwd() / seen[-1]).resolve() == tmp_path / "latest" / file
    assert (tmp_path / "latest").is_dir()
    seen.clear()
    noxfile.conformance(SimpleNamespace(posargs=[*given, "--report", "mine.json"]))
    assert seen[-2:] == ["--report", "mine.json"]


def test_the_snippet_for_ci_works_from_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text.partition("## In your CI")[2].partition("```yaml\n")[2].partition("```")[0])
    [job] = workflow["jobs"].values()
    steps = [step["run"].split() for step in job["steps"] if "run" in step]
    torch, package, judges, reports = steps
    assert [torch[:3], package[:2]] == [["pip", "install", "torch"], ["pip", "install"]]
    assert [judges[:3], reports[:3]] == [["python", "-m", "conformance"]] * 2
    # Their adapter lies in the checkout, and is found from there: python -m puts the current folder first.
    (tmp_path / "your_module.py").write_text("from examples.plain_loop_adapter import PlainLoop as Adapter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.curdir)
    assert main([*judges[3:], "--clause", "OPT-1", "--clause", "OPT-11"]) == 1
    assert "::warning title=OPT-11 fail::" in capsys.readouterr().out
    assert main(reports[3:]) == 0
    assert "OPT-11" in (tmp_path / "pages" / "index.html").read_text(encoding="utf-8")
