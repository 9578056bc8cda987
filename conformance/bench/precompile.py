"""Compile the graphs of all rows at once, each in a process of its own, before anything is measured.

Compiling one keeps one core busy for 10 to 60 seconds. One after the other they were half of the bench's time, while
all other cores had nothing to do. A row then finds its code in the caches that PyTorch keeps on disk.

Nothing is computed meanwhile: a process stops where its code would run for the first time. There the kernels are tuned,
by timing them, which must not happen beside other processes.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch

from conformance.bench.case import OPTIMIZER_STEP, Case, Setting
from conformance.bench.cases import collect
from conformance.errors import Unavailable


class Compiled(BaseException):
    """Raised where compiled code would run; no ``except Exception`` on the way out may catch it."""


def compile_ahead(cases: Sequence[Case], say: Callable[[str], None]) -> list[Case]:
    """Compile the code of all cases at once, if there are two graphs or more.

    Args:
        cases: all that will run.
        say: prints a line of progress.

    Returns:
        The cases, with the seconds that they still take.
    """
    found = graphs(cases)
    if len(found) < 2 or not precompile(found, say):
        return list(cases)
    return [replace(case, seconds=case.seconds - case.compiling) for case in cases]


def graphs(cases: Sequence[Case]) -> list[Case]:
    """Return the first case of each graph, those that take longest first."""
    first: dict[str, Case] = {}
    for case in cases:
        if case.graph:
            first.setdefault(case.graph, case)
    return sorted(first.values(), key=lambda case: -case.compiling)


def precompile(cases: Sequence[Case], say: Callable[[str], None]) -> bool:
    """Compile the graphs of these cases, as many at once as there are cores.

    What fails is printed, and costs time only: its row compiles it.

    Returns:
        False if nothing was compiled, because PyTorch was told to keep no compiled code.
    """
    import torch._inductor.config as inductor

    if inductor.force_disable_caches or not inductor.fx_graph_cache:
        say(
            "PyTorch's caches of compiled code are off, so each row compiles its own code, which takes "
            "some minutes more."
        )
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Threads of Triton's compiler in each process; PyTorch would take all cores for each.
    variables = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, 2 * cores // max(1, len(cases))))}
    started, processes, ended = time.perf_counter(), list[subprocess.Popen[str]](), threading.Event()

    def compile_one(case: Case) -> str:
        if ended.is_set():
            return ""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(command(case), env=variables, **pipes)  # type: ignore[call-overload] # as above
        processes.append(process)
        if ended.is_set():  # meanwhile
            process.kill()
        said, _ = process.communicate()
        return f": failed ({last_line(said)}), so its row compiles it" if process.returncode else ""

    say(f"Compiling the code of {len(cases)} rows, {min(cores, len(cases))} at a time: a minute or two ...")
    with ThreadPoolExecutor(cores) as pool:
        try:
            futures = {pool.submit(compile_one, case): case for case in cases}
            for done, future in enumerate(as_completed(futures), 1):
                case, took = futures[future], f"after {time.perf_counter() - started:.0f} s"
                say(f"[{done}/{len(cases)}] {case.size}, {case.name}, {took}{future.result()}")
        finally:  # Ctrl-C leaves no process behind
            ended.set()
            for process in processes:
                process.kill()
    return True


def command(case: Case) -> list[str]:
    """Return the command that compiles the graph of a case."""
    return [sys.executable, "-m", __name__, json.dumps(case.key)]


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty: of a traceback, the exception."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def compile_only(case: Case, setting: Setting) -> None:
    """Build a case and let its step run as far as the code that it compiles."""
    from torch._inductor.output_code import CompiledFxGraph

    def instead_of_running(self: CompiledFxGraph, inputs: Sequence[Any]) -> tuple[()]:
        if case.group == OPTIMIZER_STEP:
            return ()  # it works in place; the next parameter's shape is the next graph
        raise Compiled

    run = CompiledFxGraph.__call__
    CompiledFxGraph.__call__ = instead_of_running  # type: ignore[assignment, method-assign] # until it is compiled
    try:
        with backward_with_forward():
            case.build(setting).step()
    except (Compiled, Unavailable):
        pass
    finally:
        CompiledFxGraph.__call__ = run  # type: ignore[method-assign] # as it was


def backward_with_forward() -> Any:
    """Return a context in which PyTorch compiles a backward together with its forward, not when it first runs.

    The caches are keyed by this setting, too: compiling ahead and finding the code must both happen inside it.
    """
    import torch._functorch.config

    return torch._functorch.config.patch(force_non_lazy_backward_lowering=True)


def main(arguments: Sequence[str]) -> None:
    """Compile the graph of the case whose key comes as JSON, on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    [case] = [case for case in collect(device, quick=False) if case.key == tuple(json.loads(arguments[0]))]
    compile_only(case, Setting(device))


if __name__ == "__main__":
    main(sys.argv[1:])
