"""Audits of two processes on two GPUs, which exchange gradients by NCCL, beside the record of one GPU.

All processes start at once, so the file takes as long as its slowest audit. Nothing here forks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.cli import main
from tests.conformance.auditing.test_processes import SCRIPT, found, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs"),
]
HEALTHY = ("ddp", "fsdp2", "tensor-parallel")
FAULTY = {
    ("none", ""): "replicas-apart",
    ("ddp", "data"): "same-data",
    ("ddp", "one tensor"): "replicas-apart",
    ("none", "clipped"): "replicas-apart",
    ("none", "start"): "starts-differ",
}
RUNS = [("one", ""), *((kind, "") for kind in HEALTHY), *FAULTY]


def start(folder: Path, kind: str, fault: str) -> "subprocess.Popen[bytes]":
    """Start torchrun with an audit of the script."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1" if kind == "one" else "2"]
    command += ["--master-port", str(free_port()), "-m", "conformance", "audit", "--updates", "3"]
    command += ["--trace", str(folder), "--report", str(folder / "audit.json")]
    command += ["--", SCRIPT, "--device", "cuda", "--kind", kind, "--fault", fault]
    with (folder / "told.txt").open("w") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folder of each audit, all of which are done."""
    place = tmp_path_factory.mktemp("nccl")
    made = {run: place / "-".join(run).replace(" ", "-") for run in RUNS}
    started = [start(folder, *run) for run, folder in made.items()]
    for process in started:
        process.wait(timeout=300)
    return made


def report(folder: Path) -> dict[str, Any]:
    """Return what one audit reported."""
    path = folder / "audit.json"
    assert path.is_file(), (folder / "told.txt").read_text(encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_on_two_gpus_is_accused_of_nothing_and_equals_one_gpu(
    kind: str, folders: dict[tuple[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    told = report(folders[kind, ""])
    assert told["processes"] == 2
    assert not found(told, "fault")
    assert not found(report(folders["one", ""]), "fault")
    assert main(["diff", str(folders["one", ""]), str(folders[kind, ""])]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("kind", "fault"), FAULTY)
def test_a_fault_between_two_gpus_is_named(
    kind: str, fault: str, folders: dict[tuple[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert FAULTY[kind, fault] in found(report(folders[kind, fault]), "fault")
    assert main(["diff", str(folders["one", ""]), str(folders[kind, fault])]) == 1, capsys.readouterr().out
