"""What a run changes in its process is put back before the next: each hostile stack leaves something else behind."""

import io
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from conformance.recipe import Recipe
from conformance.recording.isolation import autocast_depth
from conformance.runs import Runs
from tests.conformance.test_session import Fake

LEFT: list[Any] = []  # contexts that are entered and never left


def enter(context: Any) -> None:
    context.__enter__()
    LEFT.append(context)


def add_hooks() -> None:
    nn.modules.module.register_module_forward_hook(lambda *_: None)
    register_optimizer_step_pre_hook(lambda *_: None)


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # the global generator is what a stack may draw from
    return list(state[1])


def redirect() -> None:
    sys.stdout = io.StringIO()


HOSTILE: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "no gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "inference mode": (lambda: enter(torch.inference_mode()), torch.is_inference_mode_enabled),
    "autocast": (lambda: enter(torch.autocast("cpu", torch.bfloat16)), lambda: torch.is_autocast_enabled("cpu")),
    "depth of autocast": (lambda: enter(torch.autocast("cpu", torch.bfloat16)), autocast_depth),
    "threads": (lambda: torch.set_num_threads(2), torch.get_num_threads),
    "determinism": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "anomaly detection": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "matmul precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "hooks of modules": (add_hooks, lambda: len(nn.modules.module._global_forward_hooks)),
    "directory": (lambda: os.chdir("/"), os.getcwd),
    "environment": (
        lambda: os.environ.update(OMP_NUM_THREADS="7", HOSTILE="1"),
        lambda: (os.environ.get("OMP_NUM_THREADS"), os.environ.get("HOSTILE")),
    ),
    "command line": (lambda: sys.argv.append("--hostile"), lambda: sys.argv[:]),
    "signal handlers": (
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        lambda: signal.getsignal(signal.SIGTERM),
    ),
    "alarm": (lambda: signal.signal(signal.SIGALRM, signal.SIG_IGN), partial(signal.getsignal, signal.SIGALRM)),
    "excepthook": (lambda: setattr(sys, "excepthook", print), lambda: sys.excepthook),
    "excepthook of threads": (lambda: setattr(threading, "excepthook", print), lambda: threading.excepthook),
    "torch's generator": (lambda: torch.manual_seed(7), lambda: torch.get_rng_state().tolist()),
    "Python's generator": (lambda: random.seed(7), random.getstate),
    "NumPy's generator": (lambda: np.random.seed(7), numpy_state),
    "trace": (lambda: sys.settrace(lambda *_: None), sys.gettrace),
    "loggers that are silenced": (logging.disable, lambda: logging.root.manager.disable),
    "recursion limit": (lambda: sys.setrecursionlimit(900), sys.getrecursionlimit),
    "stdout": (redirect, lambda: sys.stdout),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_put_back(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    leave, state = HOSTILE[what]
    seen = []

    def act() -> None:
        leave()
        seen.append(state())

    before = state()
    subject = Fake(act)
    with Runs(subject) as runs:
        runs.attempt(Recipe())
        after = state()
        assert seen[0] != before, "it was changed"
        assert after == before
        subject.before = lambda: None
        assert len(runs.trace(Recipe(repeat=1)).updates) == 2, "the next run is as it would have been"


def test_messages_are_seen_though_an_adapter_has_silenced_all_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # as at its import
    with Runs(Fake(lambda: logging.warning("a loss of state"))) as runs:
        assert "a loss of state" in runs.trace(Recipe()).messages
    assert logging.root.manager.disable == logging.CRITICAL


def test_a_process_that_the_run_forks_may_end_as_it_likes() -> None:
    def fork() -> None:
        child = os.fork()
        if child == 0:
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3

    with Runs(Fake(fork)) as runs:
        assert runs.attempt(Recipe()).error is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a run may compile with inductor here")
def test_torch_compile_does_not_ask_inductor_for_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """To tell them, it would be imported, which takes two seconds."""
    asked: list[object] = []

    def settings(wrapper: object) -> dict[str, object]:
        asked.append(wrapper)
        return {}

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "get_compiler_config", settings)

    def compile_a_function() -> None:
        torch.compile(lambda value: value)

    compile_a_function()
    assert len(asked) == 1, "this is what is spared"
    with Runs(Fake(compile_a_function)) as runs:
        assert runs.attempt(Recipe()).error is None
    assert len(asked) == 1
    compile_a_function()
    assert len(asked) == 2, "put back"
