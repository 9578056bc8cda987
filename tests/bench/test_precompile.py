"""Code is compiled ahead: each graph once, at once, without running; the row finds it."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conformance.bench import peers, precompile, training
from conformance.bench.case import Case, Prepared, Setting
from conformance.bench.cases import collect
from conformance.errors import Unavailable

CPU = Setting(torch.device("cpu"))


def never(setting: Setting) -> Prepared:
    raise AssertionError("compiled in another process only")


def case(name: str, graph: str = "graph", compiling: float = 1.0) -> Case:
    return Case("group", "size", name, never, graph=graph, compiling=compiling)


def test_each_graph_is_compiled_once_and_the_longest_first() -> None:
    cases = [case("A", "one"), case("B", "two", 9.0), case("C", ""), case("D", "one", 0.0), case("E", "three", 2.0)]
    assert [found.name for found in precompile.graphs(cases)] == ["B", "E", "A"]


def test_rows_that_compile_the_same_share_a_graph() -> None:
    found = precompile.graphs(collect(torch.device("cuda"), quick=False))
    assert all(case.compiling > 10 for case in found)
    names = [case.name for case in found if case.size == "gpt2-124m"]
    assert f"reference, {training.FUSED}, compiled" in names
    assert "reference, bf16-mixed, AdamW8bit, compiled" not in names  # the same model; optimizers step outside


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Those that are started. Each runs its case's name as Python, on a machine of two cores."""
    found: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **keywords: object) -> None:
            assert sum(process.poll() is None for process in found) < 2
            super().__init__(*arguments, **keywords)  # type: ignore[call-overload] # as they came
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(precompile, "command", lambda case: [sys.executable, "-S", "-c", case.name])
    return found


def test_as_many_at_once_as_there_are_cores_and_a_failure_is_said(processes: list[subprocess.Popen[bytes]]) -> None:
    threads = "import os; assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '1'"
    cases = [case(threads), case("print('no CUDA', flush=True); raise ValueError('broken')"), case("pass"), case("1")]
    lines: list[str] = []
    assert precompile.precompile(cases, lines.append)
    assert sorted(process.returncode for process in processes) == [0, 0, 0, 1]
    assert lines[0].startswith("Compiling the code of 4 rows, 2 at a time")
    assert [line.partition("]")[0] for line in lines[1:]] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    [failed] = [line for line in lines if "failed" in line]
    assert failed.endswith(": failed (ValueError: broken), so its row compiles it")


def test_the_time_left_counts_what_was_compiled_ahead(processes: list[subprocess.Popen[bytes]]) -> None:
    cases = [replace(case("pass", "one", 8.0), seconds=10.0), replace(case("1", "", 0.0), seconds=3.0)]
    assert precompile.compile_ahead(cases, print) == cases
    assert processes == []  # one graph alone is compiled where it is needed
    cases.append(replace(case("pass", "two", 2.0), seconds=5.0))
    assert [found.seconds for found in precompile.compile_ahead(cases, print)] == [2.0, 3.0, 3.0]
    assert len(processes) == 2
    with torch._inductor.config.patch(force_disable_caches=True):
        assert precompile.compile_ahead(cases, print) == cases


def test_without_caches_nothing_is_compiled_ahead(processes: list[subprocess.Popen[bytes]]) -> None:
    lines: list[str] = []
    with torch._inductor.config.patch(force_disable_caches=True):
        assert not precompile.precompile([case("pass"), case("1")], lines.append)
    assert processes == []
    assert lines == [
        "PyTorch's caches of compiled code are off, so each row compiles its own code, which takes some minutes more."
    ]


def test_ctrl_c_leaves_no_process(processes: list[subprocess.Popen[bytes]]) -> None:
    def say(line: str) -> None:
        if line.startswith("[1/3]"):
            raise KeyboardInterrupt

    endless = "import time; time.sleep(600)"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        precompile.precompile([case("pass"), case(endless), case(endless)], say)
    assert len(processes) >= 2
    assert all(process.poll() is not None for process in processes)
    assert time.monotonic() - started < 300


def test_a_row_that_cannot_run_is_no_failure() -> None:
    def missing(setting: Setting) -> Prepared:
        raise Unavailable("litgpt cannot be imported.")

    precompile.compile_only(replace(case("A"), build=missing), CPU)


@pytest.mark.slow  # inductor, for the CPU
@pytest.mark.filterwarnings("ignore")  # of torchao's import, and of inductor's
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("name", ["reference", "reference's GPT", "LitGPT, loss in chunks", "torchao"])
def test_the_row_finds_what_was_compiled_ahead(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    if name.startswith("LitGPT"):
        pytest.importorskip("litgpt", reason="LitGPT is not installed: pip install 'gpt-conformance[peers]'")
    if name == "torchao":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install 'gpt-conformance[torchao]'")
    for module in (training, peers):
        monkeypatch.setattr(module, "compiles", lambda _: True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graphs = [found for found in precompile.graphs(collect(CPU.device, False)) if found.name.startswith(name)]
    chosen = graphs[0]

    def caches(what: str) -> int:
        return counters["inductor"][f"fxgraph_cache_{what}"]

    torch._dynamo.reset()
    counters.clear()
    precompile.compile_only(chosen, CPU)
    compiled = caches("miss")
    assert (compiled > 1, caches("hit")) == (True, 0)  # forward and backward, or several shapes
    torch._dynamo.reset()
    with precompile.backward_with_forward():
        chosen.build(CPU).step()
    torch._dynamo.reset()
    assert (caches("miss"), caches("hit")) == (compiled, compiled)
