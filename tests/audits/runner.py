"""Run the audit's command on a script, in processes forked from this one: an import of PyTorch is paid once."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.recording.ranks import free_port

SCRIPTS = Path(__file__).parent / "scripts"
SECONDS = 180
NEEDS = {
    "accelerate_args": "accelerate",
    "hf_trainer": "transformers",
    "lightning_trainer": "lightning",
    "schedule_free": "schedulefree",
    "trl_sft": "trl",
}
RANKS = {"ddp_by_hand": 2, "fsdp2_by_hand": 2}


@dataclass(frozen=True)
class Audited:
    """What one audit said: its exit code, its findings as in the JSON report, and all that went to the terminal."""

    code: int
    findings: list[dict[str, Any]]
    output: str

    def found(self, *outcomes: str) -> list[dict[str, Any]]:
        """Return the findings with one of these outcomes."""
        return [finding for finding in self.findings if finding["outcome"] in outcomes]


def names() -> list[str]:
    """Return the names of the honest scripts."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py"))


def missing(script: str) -> str:
    """Return why a script cannot run here: the package that is not installed; or nothing."""
    package = NEEDS.get(script, "")
    return f"{package} is not installed" if package and importlib.util.find_spec(package) is None else ""


def audit(
    text: str, name: str, arguments: Sequence[str] = (), ranks: int = 1, updates: int = 4, before: Sequence[str] = (),
    text_before: str = "", both_watched: bool = False,
) -> Audited:  # fmt: skip
    """Audit the text of a script in a folder of its own.

    Args:
        text: of the script.
        name: of its file, without the ending.
        arguments: of the audited run.
        ranks: processes.
        updates: to record.
        before: arguments of a run before it, which leaves a checkpoint; that run is not recorded.
        text_before: of the script in that run, if it is another one.
        both_watched: audit a run without arguments, too, and resume from what it leaves.
    """
    with tempfile.TemporaryDirectory(prefix="audit-") as place:
        folder = Path(place).resolve()
        script = folder / f"{name}.py"
        if before and not both_watched:
            script.write_text(text_before or text, encoding="utf-8")
            start(folder, ranks, ["plain", str(script), *before])
        script.write_text(text, encoding="utf-8")
        options = ["--updates", str(updates), "--report", str(folder / "report.json")]
        if both_watched:
            options += ["--resume-with", " ".join([script.name, *arguments])]
        code = start(folder, ranks, ["audit", *options, "--", str(script), *(() if both_watched else arguments)])
        findings = [
            finding
            for report in sorted(folder.glob("report*.json"))
            for finding in json.loads(report.read_text(encoding="utf-8"))["findings"]
        ]
        output = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("terminal-*")))
    return Audited(code, findings, output)


def start(folder: Path, ranks: int, command: list[str]) -> int:
    """Run a command on each rank and return the first exit code that is not 0."""

    import conformance.auditing.command
    import conformance.cli  # noqa: F401  # imported before the fork, for all children

    port = free_port()
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: ours compute nothing
        processes = [
            context.Process(target=in_child, args=(folder, rank, ranks, port, command)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return next((process.exitcode or 0 for process in processes if process.exitcode), 0)


def in_child(folder: Path, rank: int, ranks: int, port: int, command: list[str]) -> None:
    """Become a process that the command line or torchrun might have started, and leave with its exit code."""
    os.chdir(folder)
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    terminal = os.open(folder / f"terminal-{command[0]}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 # as long as the process lives
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # it is the stream of this process until it ends
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    code = 1
    with contextlib.suppress(BaseException):
        code = run(command)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def run(command: list[str]) -> int:
    """Run the audit, or a script as it is after ``plain``."""
    import traceback

    import torch

    torch.set_num_threads(1)
    try:
        if command[0] == "plain":
            import runpy

            sys.argv[:] = command[1:]
            runpy.run_path(command[1], run_name="__main__")
            return 0
        if command[0] == "torch-audit":
            import runpy

            from tests.audits.torch_audit import watching

            sys.argv[:] = command[1:]
            with watching(Path(f"torch-audit-{os.environ.get('RANK', '0')}.json").resolve()):
                runpy.run_path(command[1], run_name="__main__")
            return 0
        from conformance.cli import main

        return main(command)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        raise
