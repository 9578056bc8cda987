"""What pytest runs, one test per case: pytest-benchmark takes the rounds and writes its JSON."""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conformance.bench.case import Case
from conformance.bench.run import Run


def test_case(case: Case, run: Run, benchmark: Any) -> None:
    """Measure one case; the run keeps its row."""
    run.run_case(case, benchmark)


class Cases:
    """The plugin that gives pytest the cases of a run."""

    def __init__(self, run: Run, machine: Mapping[str, object]) -> None:
        self._run, self.machine = run, machine

    @pytest.fixture
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of each case, with the run's clock as pytest-benchmark's timer."""
        mark = pytest.mark.benchmark
        timer = self._run.clock.mark
        cases = [pytest.param(c, id=" / ".join(c.key), marks=mark(timer=timer, group=c.group)) for c in self._run.cases]
        metafunc.parametrize("case", cases)

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, object]:
        """Return the environment. pytest-benchmark's own does not know a GPU, and takes seconds to find the CPU."""
        return dict(self.machine)


def run_suite(run: Run, json_file: Path, machine: Mapping[str, object]) -> bool:
    """Run all cases of ``run`` in this process, and write pytest-benchmark's JSON if a row was measured.

    The caller's pytest takes no part: not its configuration, plugins, conftests, nor its variables, of which
    pytest-xdist's would switch pytest-benchmark off.

    Args:
        run: what to measure.
        json_file: where pytest-benchmark writes.
        machine: what the JSON says of the machine.

    Returns:
        False if pytest itself broke; what it said is on stderr.
    """
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
    ):
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:
            patch.delenv(name)
        config = Path(folder) / "pytest.ini"
        config.write_text("[pytest]\n", encoding="utf-8")
        isolated = ["-c", str(config), "--noconftest", "--disable-plugin-autoload", "-p", "benchmark", "-W", "ignore"]
        tidy = ["-p", "no:cacheprovider", f"--benchmark-storage=file://{folder}/storage", "--assert=plain"]
        measure = ["--benchmark-disable-gc", f"--benchmark-json={json_file}", "--benchmark-quiet", "--capture=sys"]
        code = pytest.main(["--pyargs", __name__, *isolated, *tidy, *measure], plugins=[Cases(run, machine)])
    run.drop()
    if code == pytest.ExitCode.INTERRUPTED:  # Ctrl-C between two cases
        run.interrupted, run.stopped = True, "interrupted"
    elif code != pytest.ExitCode.OK:
        print(said.getvalue(), file=sys.stderr)
        return False
    return True
