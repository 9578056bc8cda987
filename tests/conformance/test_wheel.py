"""What is published works by itself: the wheel, installed elsewhere, judges from an empty folder."""

import configparser
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from email.message import Message
from email.parser import Parser
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("pip reaches no index with hatchling, by which the wheel is built")
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run Python where the wheel is installed; gives what it printed.

    PYTHONPATH comes before site-packages and before the path that an editable install adds, so the wheel's modules
    are the ones imported.
    """
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
    environment |= {"PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

    def python(folder: Path, *arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout.replace(str(target), "SITE")

    return python


def contents(wheel: Path) -> tuple[set[str], Message]:
    """Names of the files in a wheel, and its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return names, Parser().parsestr(archive.read(metadata).decode())


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names, _ = contents(wheel)
    written = {
        str(path.relative_to(ROOT))
        for package in ("conformance", "reference")
        for path in ROOT.glob(f"{package}/**/*.py")
    }
    assert {name for name in names if name.endswith(".py")} == written
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "conformance",
        "reference",
        "gpt_conformance",
    }


def test_the_wheel_keeps_the_promises_of_its_metadata(wheel: Path) -> None:
    names, metadata = contents(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert {"conformance/py.typed", "reference/py.typed"} <= names


def test_the_wheel_declares_commands_and_no_plugin(wheel: Path) -> None:
    declared = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        declared.read_string(archive.read(name).decode())
    commands = {"gpt-conformance": "conformance.__main__:entry", "gpt-reference": "reference.__main__:main"}
    assert {section: dict(declared[section]) for section in declared.sections()} == {"console_scripts": commands}


def test_an_installed_wheel_judges_from_an_empty_folder(run: Run, tmp_path: Path) -> None:
    where = "import conformance, reference; print(conformance.__file__, reference.__file__)"
    assert run(tmp_path, "-c", where) == "SITE/conformance/__init__.py SITE/reference/__init__.py\n"
    suite = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "conformance.plugin", "--pyargs"]
    options = ["--subject", "reference", "--clause", "DECAY-1", "--report", "out.json"]
    output = run(tmp_path, *suite, "conformance.suites", *options)
    assert f"Written: {tmp_path / 'out.json'}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(entry["id"], entry["outcome"]) for entry in report["clauses"]] == [("DECAY-1", "pass")]


def base_only(wheel: Path, folder: Path) -> Path:
    """A folder with links to what the wheel requires without any extra, and to what that requires, and no more."""
    site, waiting, seen = folder / "site", requirements(contents(wheel)[1].get_all("Requires-Dist", [])), set()
    site.mkdir()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # needed on another system only
            continue
        waiting |= requirements(found.requires or [])
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))
    return site


def requirements(lines: list[str]) -> set[str]:
    """Names of the requirements that hold here without any extra."""
    parsed = [Requirement(line) for line in lines]
    return {r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


@pytest.mark.slow  # ten seconds
def test_the_base_alone_judges_a_plain_loop(wheel: Path, tmp_path: Path) -> None:
    site = base_only(wheel, tmp_path)
    assert not {"lightning", "bitsandbytes", "grokadamw", "safetensors", "jsonargparse"} & set(os.listdir(site))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
    environment |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", "-m", "conformance", "run", "--report", "out.json", "--subject"]
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    ran = run([*command, "examples.plain_loop_adapter:PlainLoop"])
    assert ran.returncode == 1, ran.stderr  # CLIP-3 and others are findings
    found = {row["id"]: row for row in json.loads((tmp_path / "out.json").read_text())["clauses"]}
    outcomes = Counter(row["outcome"] for row in found.values())
    assert outcomes["error"] == 0, [row for row in found.values() if row["outcome"] == "error"]
    assert outcomes["pass"] > 30
    assert found["OPT-2"]["outcome"] == "n/a"
    assert found["OPT-2"]["reason"] == ("bitsandbytes is not installed: pip install 'gpt-conformance[optimizers]'")
    ran = run([*command, "reference"])
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.endswith("Install it with: pip install 'gpt-conformance[reference]'.\n")
