"""The command line on two processes, started by Fabric's own launcher and by torchrun: the same run as on one."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference.checkpoint import load_for_inference
from reference.cli.loggers import metrics_file

pytestmark = pytest.mark.slow  # each process imports everything anew, some seconds

TRAIN = [
    *("-m", "reference", "train", "--data.path", "data", "--data.microbatch_size", "2", "--train.updates", "4"),
    *("--model.n_layer", "1", "--model.n_embd", "32", "--model.block_size", "16", "--train.evaluate_every", "2"),
    *("--train.evaluate_batches", "2", "--train.accelerator", "cpu", "--train.optimizer", "torch.optim.SGD"),
    *("--train.optimizer_args", "{lr: 0.1}", "--train.log_every", "1", "--train.warmup", "0"),
]
TWO = ["--train.devices", "2", "--train.strategy", "ddp"]
LAUNCHERS = {
    "one process": [*TRAIN, "--train.microbatches", "2"],
    "fabric": [*TRAIN, *TWO],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", *TRAIN, *TWO],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launchers")
    text = path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"document {number} of these tests " * 9)
    run(path, "-m", "reference", "prepare", "--text", "text", "--out", "data")
    return path


def run(folder: Path, *arguments: str) -> str:
    """Run Python in the folder; what it wrote to stderr."""
    root = str(Path(__file__).parents[2])
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(directory: Path) -> list[float]:
    with metrics_file(directory).open(newline="", encoding="utf-8") as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]


def test_two_processes_do_what_one_does(folder: Path) -> None:
    seen = {}
    for name, command in LAUNCHERS.items():
        log = run(folder, *command, "--directory", f"out/{name}")
        assert log.count("update 4/4") == 1, log  # rank 0 alone speaks
        seen[name] = losses(folder / "out" / name)
    assert len(seen["one process"]) == 4
    assert seen["fabric"] == seen["torchrun"] == pytest.approx(seen["one process"], rel=1e-5)
    weights = [load_for_inference(folder / "out" / name / "step-00000004").state_dict() for name in LAUNCHERS]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name]), name
        # Measured: 0. A gradient that is half as large moves the weights by 5e-2.
        assert (weights[1][name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_a_run_on_two_processes_goes_on_with_one(folder: Path) -> None:
    run(folder, *LAUNCHERS["torchrun"], "--directory", "out/first")
    command = [*LAUNCHERS["one process"], "--train.updates", "6", "--resume", "out/first", "--directory", "out/second"]
    run(folder, *command)
    assert len(losses(folder / "out" / "second")) == 2


def test_waiting_for_another_node_is_said_and_ends_by_ctrl_c(folder: Path) -> None:
    root = str(Path(__file__).parents[2])
    variables = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": root,
        "MASTER_PORT": "0",
    }
    command = [sys.executable, *TRAIN, "--train.num_nodes", "2", "--directory", "out/nodes"]
    process = subprocess.Popen(command, cwd=folder, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "waiting" in line)
        assert "waiting for 2 nodes of 1 process(es) each at 127.0.0.1, port " in said
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.communicate()
