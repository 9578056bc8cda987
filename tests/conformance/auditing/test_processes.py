"""Audits of several processes of this machine, and their records beside those of one process.

Two of the tests start them by torchrun. The others fork, which spares each process the imports, some seconds.
"""

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.cli import main

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parent / "parallel.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def audit(folder: Path, kind: str, fault: str = "", processes: int = 2, torchrun: bool = False) -> dict[str, Any]:
    """Audit the script on some processes; return the report."""
    folder.mkdir()
    report, told = folder / "audit.json", folder / "told.txt"
    words = ["audit", "--updates", "3", "--trace", str(folder), "--report", str(report)]
    words += ["--", SCRIPT, "--kind", kind, "--fault", fault]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--master-port", str(free_port()), "-m", "conformance", *words]
        with told.open("w") as stream:
            subprocess.run(command, stdout=stream, stderr=stream, env=ENVIRONMENT, timeout=300)
    else:
        fork(words, processes, told)
    assert report.is_file(), told.read_text(encoding="utf-8")
    return dict(json.loads(report.read_text(encoding="utf-8")))


def fork(words: list[str], processes: int, told: Path) -> None:
    """Run a command line on some processes, which find their places as under torchrun."""
    if torch.cuda.is_available():
        pytest.skip("autograd refuses to work in a fork where there is a GPU: hide it")
    for module in ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo"):
        importlib.import_module(module)  # once, before the fork
    context, port = multiprocessing.get_context("fork"), free_port()
    with warnings.catch_warnings():
        # Python 3.12 warns that a forked process may deadlock on locks held by other threads. Ours compute with one.
        warnings.simplefilter("ignore", DeprecationWarning)
        started = [context.Process(target=run, args=(words, rank, processes, port, told)) for rank in range(processes)]
        for process in started:
            process.start()
    for process in started:
        process.join(timeout=300)
        process.kill()


def run(words: list[str], rank: int, processes: int, port: int, told: Path) -> None:
    """Run a command line in this process, a forked one."""
    with told.open("a") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    warnings.resetwarnings()  # no errors, as in a process of its own
    if processes > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    main(words)


def found(report: dict[str, Any], outcome: str) -> dict[str, str]:
    """Return what was seen by each rule with this outcome."""
    return {entry["rule"]: entry["seen"] for entry in report["findings"] if entry["outcome"] == outcome}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record of the run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    assert not found(audit(folder, "one", processes=1), "fault")
    return folder


@pytest.mark.parametrize(("kind", "torchrun"), [("ddp", True), ("fsdp2", False), ("tensor-parallel", False)])
def test_a_healthy_parallel_run_is_accused_of_nothing_and_equals_one_process(
    kind: str, torchrun: bool, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = audit(tmp_path / "two", kind, torchrun=torchrun)
    assert report["processes"] == 2
    assert not found(report, "fault")
    assert main(["diff", str(alone), str(tmp_path / "two")]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "fault", "rule", "phase", "tensors"),
    [
        ("none", "", "replicas-apart", "gradient", 9),
        ("ddp", "data", "same-data", "data", 0),
        ("ddp", "one tensor", "replicas-apart", "gradient", ["3.bias"]),
        ("none", "clipped", "replicas-apart", "gradient", ["3.bias"]),
        ("none", "start", "starts-differ", "start", 7),
    ],
)
def test_a_fault_between_processes_is_named(
    kind: str,
    fault: str,
    rule: str,
    phase: str,
    tensors: int | list[str],
    alone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = found(audit(tmp_path / "two", kind, fault), "fault")
    assert rule in seen
    assert fault != "one tensor" or "3.bias" in seen[rule]
    assert fault != "clipped" or "; the gradients of 3.bias are not reduced; clipping multiplies" in seen[rule]

    assert main(["diff", str(alone), str(tmp_path / "two"), "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    parted = told["seen"][-1]
    assert (parted["update"], parted["phase"]) == (0 if phase == "start" else 1, phase)
    assert parted["tensors"] == tensors or len(parted["tensors"]) == tensors
    assert fault == "data" or "second run hold different copies: process 1 differs from process 0" in parted["words"]


def test_two_nodes_write_one_report(tmp_path: Path) -> None:
    """Two agents of torchrun, each with a process of its own, as on two machines."""
    address = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *address, "--nproc-per-node", "1"]
    judged = ["-m", "conformance", "audit", "--updates", "2"]
    script = ["--", SCRIPT, "--kind", "ddp"]
    reports = [tmp_path / f"node-{node}.json" for node in (0, 1)]
    nodes = [
        subprocess.Popen(
            [
                *command,
                "--node-rank",
                str(node),
                *judged,
                "--report",
                str(reports[node]),
                *script,
            ],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    assert json.loads(reports[0].read_text(encoding="utf-8"))["processes"] == 2
    assert not reports[1].exists()
