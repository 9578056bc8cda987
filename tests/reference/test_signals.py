"""Ctrl-C and SIGTERM end a run after the update that is running, with a checkpoint; a second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import checkpoint
from reference.config import GPTConfig, TrainConfig
from reference.model.gpt import GPT
from reference.training.stopping import ended_by_signals
from reference.training.trainer import FitResult, Record, Trainer

MODEL = GPTConfig.gpt2(vocab_size=16, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1)
UPDATES = 6
USUAL = (signal.default_int_handler, signal.SIG_DFL)
# Python 3.12 warns of threads that a forked child does not have.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def usual_handlers() -> Any:
    """Python's own handlers, before and after: a test that fails must not leave others."""
    before = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM)}
    signal.signal(SIGINT, signal.default_int_handler)
    signal.signal(SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fit(directory: Path, batches: Any, callback: Any = None, resume: Any = False, **changes: Any) -> FitResult:
    config = TrainConfig(updates=UPDATES, accelerator="cpu", optimizer_args={"lr": 0.01}, warmup=1, **changes)
    return Trainer(MODEL, config, directory, [callback] if callback else []).fit(batches, resume=resume)


def after(update: int, *numbers: Signals) -> Callable[[Record], None]:
    """A callback that sends this process signals after an update."""

    def send(record: Record) -> None:
        if record.update == update:
            for number in numbers:
                signal.raise_signal(number)

    return send


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def handlers() -> tuple[Any, Any]:
    return signal.getsignal(SIGINT), signal.getsignal(SIGTERM)


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("save_every", [None, 5])
@pytest.mark.parametrize("update", range(1, UPDATES - 1))
def test_a_stopped_run_saves_and_goes_on_bit_equal(
    tmp_path: Path, batches: list[Tensor], number: Signals, save_every: int | None, update: int
) -> None:
    whole = fit(tmp_path / "whole", batches)
    stopped = fit(tmp_path / "out", batches, after(update, number), save_every=save_every)
    assert stopped.stopped == number
    assert isinstance(stopped.stopped, Signals)
    done = len(stopped.records)
    assert update <= done <= update + 1, "it did not stop after the update that was running"
    assert checkpoint.checkpoints(tmp_path / "out") == [checkpoint.step_folder(tmp_path / "out", done)]
    assert handlers() == USUAL
    resumed = fit(tmp_path / "out", batches, resume="auto", save_every=save_every)
    assert resumed.stopped is None
    assert stopped.records + resumed.records == whole.records
    assert same(resumed.model, whole.model)


@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=lambda number: number.name)
def test_the_update_that_is_running_is_finished(tmp_path: Path, batches: list[Tensor], number: Signals) -> None:
    def send(module: nn.Module, arguments: Any) -> None:
        if isinstance(module, GPT):
            forwards.append(module)
            if len(forwards) == 3:
                signal.raise_signal(number)

    forwards: list[nn.Module] = []
    whole = fit(tmp_path / "whole", batches)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(send)
    try:
        stopped = fit(tmp_path / "out", batches)
    finally:
        handle.remove()
    assert stopped.stopped == number
    assert stopped.records == whole.records[:3]
    assert checkpoint.load_state(checkpoint.step_folder(tmp_path / "out", 3))["update"] == 3


def test_a_signal_before_the_first_update(tmp_path: Path, batches: list[Tensor]) -> None:
    def build() -> nn.Module:
        signal.raise_signal(SIGTERM)
        return GPT(MODEL)

    result = Trainer(build, TrainConfig(updates=3, accelerator="cpu"), tmp_path).fit(batches)
    assert (result.stopped, len(result.records)) == (SIGTERM, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_run_at_its_end_has_not_been_stopped(tmp_path: Path, batches: list[Tensor]) -> None:
    result = fit(tmp_path, batches, after(UPDATES, SIGINT))
    assert result.stopped is None
    assert len(result.records) == UPDATES
    assert handlers() == USUAL


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, batches: list[Tensor]) -> None:
    seen: list[int] = []

    def twice(record: Record) -> None:
        seen.append(record.update)
        if record.update == 3:
            signal.raise_signal(SIGINT)
            signal.raise_signal(SIGINT)
            seen.append(-1)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, batches, twice, save_every=2)
    assert seen == [1, 2, 3]
    assert handlers() == USUAL
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@needs_fork
@pytest.mark.parametrize("order", [(SIGINT, SIGTERM), (SIGTERM, SIGINT)], ids=["int-term", "term-int"])
@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_both_signals_together_are_one(
    tmp_path: Path, batches: list[Tensor], capfd: pytest.CaptureFixture[str], order: Any, pause: float
) -> None:
    """Sent while signals are blocked, and one after the other: nothing is printed, and the run is saved."""

    def send(record: Record) -> None:
        if record.update == 2:
            if pause:
                for number in order:
                    os.kill(os.getpid(), number)
                    time.sleep(pause)
            else:
                signal.pthread_sigmask(signal.SIG_BLOCK, order)
                for number in order:
                    os.kill(os.getpid(), number)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, order)

    result = fit(tmp_path, batches, send)
    assert result.stopped in order
    assert checkpoint.checkpoints(tmp_path) == [checkpoint.step_folder(tmp_path, len(result.records))]
    assert handlers() == USUAL
    assert "ignored due to race" not in capfd.readouterr().err


def test_the_other_signal_acts_later(tmp_path: Path, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reference.training.stopping.TOGETHER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, batches, after(2, SIGTERM, SIGINT))
    assert handlers() == USUAL


@pytest.mark.parametrize("ending", ["end", "error", "signal"])
def test_handlers_are_as_before(tmp_path: Path, batches: list[Tensor], ending: str) -> None:
    def own(number: int, frame: Any) -> None:
        called.append(number)

    def callback(record: Record) -> None:
        inside.append(handlers())
        if ending == "error":
            raise InterruptedError
        if ending == "signal" and record.update == 2:
            signal.raise_signal(SIGTERM)
            signal.raise_signal(SIGTERM)  # the second is for the handler that was there

    called: list[int] = []
    inside: list[Any] = []
    signal.signal(SIGTERM, own)
    signal.signal(SIGINT, signal.SIG_IGN)
    if ending == "error":
        with pytest.raises(InterruptedError):
            fit(tmp_path, batches, callback)
    else:
        assert fit(tmp_path, batches, callback).stopped == (SIGTERM if ending == "signal" else None)
    assert handlers() == (signal.SIG_IGN, own)
    assert inside[0] != handlers(), "the run had no handlers of its own"
    assert called == ([SIGTERM] if ending == "signal" else [])


def test_in_another_thread_nothing_is_changed(tmp_path: Path, batches: list[Tensor]) -> None:
    seen: list[Any] = []
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(fit(tmp_path, batches, lambda _: seen.append(handlers()))))
    thread.start()
    thread.join()
    assert seen == [USUAL] * UPDATES
    assert results[0].stopped is None


def in_child(directory: Path, batches: list[Tensor], patience: float) -> tuple[int, int]:
    """Train in a child that tells, byte by byte, which update it has done.

    After the second it waits for a signal, tells that it has noted it, and sleeps.
    """
    arrives, leaves = os.pipe()
    child = os.fork()
    if child == 0:
        try:

            def tell(record: Record) -> None:
                os.write(leaves, bytes([record.update]))
                if record.update == 2:
                    deadline = time.monotonic() + 20
                    while not set(handlers()) & set(USUAL):
                        assert time.monotonic() < deadline, "no signal was noted"
                        time.sleep(0.005)
                    os.write(leaves, b"!")
                    time.sleep(patience)

            stopped = fit(directory, batches, tell, save_every=100).stopped
            os._exit(100 + (stopped or 0))
        except KeyboardInterrupt:
            os._exit(50)
        except BaseException as error:  # no test may go on in the child
            os.write(2, f"the child: {error!r}\n".encode())
            os._exit(1)
    os.close(leaves)
    return child, arrives


@needs_fork
@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=lambda number: number.name)
def test_a_signal_from_outside(tmp_path: Path, batches: list[Tensor], number: Signals) -> None:
    whole = fit(tmp_path / "whole", batches)
    child, arrives = in_child(tmp_path / "out", batches, patience=0)
    with os.fdopen(arrives, "rb") as pipe:
        assert pipe.read(2) == b"\1\2"
        os.kill(child, number)
        rest = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 100 + number
    assert rest in (b"!", b"!\3"), "it went on"
    resumed = fit(tmp_path / "out", batches, resume=True)
    assert resumed.records == whole.records[1 + len(rest) :]
    assert same(resumed.model, whole.model)


@needs_fork
@pytest.mark.parametrize("number", [SIGINT, SIGTERM], ids=lambda number: number.name)
def test_a_second_signal_from_outside(tmp_path: Path, batches: list[Tensor], number: Signals) -> None:
    child, arrives = in_child(tmp_path / "out", batches, patience=60)
    started = time.perf_counter()
    with os.fdopen(arrives, "rb") as pipe:
        assert pipe.read(2) == b"\1\2"
        os.kill(child, number)
        assert pipe.read(1) == b"!"
        os.kill(child, number)
        assert pipe.read() == b""
    status = os.waitpid(child, 0)[1]
    assert time.perf_counter() - started < 30
    if number == SIGTERM:
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == SIGTERM
    else:
        assert os.WEXITSTATUS(status) == 50  # KeyboardInterrupt
    assert not any((tmp_path / "out").iterdir()), "a checkpoint was written"


def test_while_it_waits_for_other_nodes_the_operating_system_ends_it() -> None:
    """Handlers of Python do not run then."""
    with ended_by_signals():
        assert [signal.getsignal(number) for number in (SIGINT, SIGTERM)] == [signal.SIG_DFL] * 2
    assert (signal.getsignal(SIGINT), signal.getsignal(SIGTERM)) == USUAL
    found: list[object] = []

    def elsewhere() -> None:
        with ended_by_signals():
            found.append(signal.getsignal(SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
