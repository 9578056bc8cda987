"""Audits of several processes, started by torchrun on this machine; and their records beside those of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance.cli import main

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parent / "parallel.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def audit(folder: Path, kind: str, fault: str = "", processes: int = 2) -> dict[str, Any]:
    """Audit the script on some processes; return the report."""
    folder.mkdir()
    report = folder / "audit.json"
    command = [sys.executable, "-m"]
    if processes > 1:
        port = str(free_port())
        command += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, "-m"]
    command += ["conformance", "audit", "--updates", "3", "--trace", str(folder), "--report", str(report)]
    command += ["--", SCRIPT, "--kind", kind, "--fault", fault]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert report.is_file(), ended.stdout + ended.stderr
    return dict(json.loads(report.read_text(encoding="utf-8")))


def found(report: dict[str, Any], outcome: str) -> dict[str, str]:
    """Return what was seen by each rule with this outcome."""
    return {entry["rule"]: entry["seen"] for entry in report["findings"] if entry["outcome"] == outcome}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record of the run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    assert not found(audit(folder, "one", processes=1), "fault")
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor-parallel"])
def test_a_healthy_parallel_run_is_accused_of_nothing_and_equals_one_process(
    kind: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = audit(tmp_path / "two", kind)
    assert report["processes"] == 2
    assert not found(report, "fault")
    assert main(["diff", str(alone), str(tmp_path / "two")]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "fault", "rule"),
    [
        ("none", "", "replicas-apart"),
        ("ddp", "data", "same-data"),
        ("ddp", "one tensor", "replicas-apart"),
        ("none", "clipped", "replicas-apart"),
        ("none", "start", "starts-differ"),
    ],
)
def test_a_fault_between_processes_is_named(kind: str, fault: str, rule: str, tmp_path: Path) -> None:
    seen = found(audit(tmp_path / "two", kind, fault), "fault")
    assert rule in seen
    assert fault != "one tensor" or "3.bias" in seen[rule]
    assert fault != "clipped" or "; the gradients of 3.bias are not reduced; clipping multiplies" in seen[rule]


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
