"""What pytest runs, one test per case, and how it is run.

:class:`conformance.bench.run.Run` is the plugin that gives it the cases.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance.bench.case import Case

if TYPE_CHECKING:
    from conformance.bench.run import Run


def test_case(case: Case, bench: Any, benchmark: Any) -> None:
    """Measure one case; its row is kept by the run."""
    bench.run_case(case, benchmark)


def run_suite(run: "Run", json_file: Path) -> bool:
    """Run all cases of ``run`` in this process, and write pytest-benchmark's JSON if a row was measured.

    Returns:
        False if pytest itself broke; what it said is on stderr.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, without_pytest_variables(), contextlib.redirect_stdout(said):
        code = pytest.main(pytest_arguments(json_file, Path(folder)), plugins=[run])
    run.drop()
    if code == pytest.ExitCode.INTERRUPTED:  # Ctrl-C between two cases
        run.interrupted, run.stopped = True, "interrupted"
    elif code != pytest.ExitCode.OK:
        print(said.getvalue(), file=sys.stderr)
        return False
    return True


def pytest_arguments(json_file: Path, folder: Path) -> list[str]:
    """So that pytest runs this file and nothing else: no configuration, plugin or conftest of where it is started.

    Args:
        json_file: where pytest-benchmark writes.
        folder: an empty one, for what pytest wants to have somewhere.
    """
    config = folder / "pytest.ini"
    config.write_text("[pytest]\n", encoding="utf-8")
    isolated = ["-c", str(config), "--noconftest", "--disable-plugin-autoload", "-p", "benchmark"]
    tidy = ["-p", "no:cacheprovider", f"--benchmark-storage=file://{folder}/storage", "--assert=plain"]
    quiet = ["-qq", "--no-header", "--no-summary", "--capture=sys", "-W", "ignore", "--benchmark-quiet"]
    measure = ["--benchmark-disable-gc", f"--benchmark-json={json_file}"]
    return ["--pyargs", __name__, *isolated, *tidy, *quiet, *measure]


@contextlib.contextmanager
def without_pytest_variables() -> Iterator[None]:
    """Hide the caller's PYTEST_ADDOPTS and PYTEST_PLUGINS from the bench's own pytest."""
    hidden = {name: os.environ.pop(name) for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS") if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden
