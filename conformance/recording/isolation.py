"""What surrounds a run: one thread, nothing compiled, NaN in fresh memory, messages collected, nothing left behind."""

import contextlib
import io
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def quiet_and_deterministic() -> Iterator[None]:
    """One thread, no compilation, NaN in uninitialised memory, and afterwards everything as it was."""
    with everything_put_back(), inductor_not_imported(), torch.compiler.set_stance("force_eager"):
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined] # set by its module
        yield


@contextlib.contextmanager
def inductor_not_imported() -> Iterator[None]:
    """Keep torch.compile from importing inductor, which takes two seconds, only to note its settings.

    Where there is no GPU, no run compiles with inductor. Yet each call of torch.compile, such as bitsandbytes' when it
    is imported, asks the default backend for its settings.
    """
    wrapper: Any = torch._TorchCompileInductorWrapper
    original = wrapper.get_compiler_config
    if not torch.cuda.is_available():
        wrapper.get_compiler_config = lambda _: {}
    try:
        yield
    finally:
        wrapper.get_compiler_config = original


@contextlib.contextmanager
def everything_put_back() -> Iterator[None]:
    """Put back all that a run may change in its process and that the next run would meet."""
    undo = [put_back() for put_back in (torch_modes, random_states, process_state, module_hooks)]
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


GUARDS: list[object] = []
"""Guards of inference mode that a run left open, and that were covered by others."""


def torch_modes() -> Callable[[], None]:
    """Return a function that puts back PyTorch's modes: dtype, device, gradients, autocast, threads, determinism."""
    deterministic: Any = torch.utils.deterministic
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    device, default_device = torch.get_default_device(), torch.utils._device.CURRENT_DEVICE
    gradients, anomaly = torch.is_grad_enabled(), torch.is_anomaly_enabled()
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, precision = deterministic.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    kinds = [kind for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    cached, inference, depth = torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled(), autocast_depth()

    def undo() -> None:
        if torch.is_inference_mode_enabled() != inference:
            # There is no setter: another guard is entered, and kept for as long as the process lives.
            GUARDS.append(torch.autograd.grad_mode._enter_inference_mode(inference))
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        if default_device != torch.utils._device.CURRENT_DEVICE:
            torch.set_default_device(None if default_device is None else device)
        torch.set_grad_enabled(gradients)
        torch.set_anomaly_enabled(anomaly)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        deterministic.fill_uninitialized_memory = fill
        if torch.get_float32_matmul_precision() != precision:  # the setter changes what each backend says, too
            torch.set_float32_matmul_precision(precision)
        for kind, (enabled, kept) in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, kept)
        torch.set_autocast_cache_enabled(cached)
        # Leaving the outermost autocast clears the cache of cast weights. If one is never left, no other is outermost,
        # and later runs compute with weights cast before the update.
        while autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

    return undo


def autocast_depth() -> int:
    """Return how many autocast contexts are open."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def random_states() -> Callable[[], None]:
    """Return a function that puts back the generators of Python, NumPy and PyTorch's CPU."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None, torch.get_rng_state()

    def undo() -> None:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])

    return undo


def process_state() -> Callable[[], None]:
    """Return a function that puts back directory, environment, command line, hooks, limits and signal handlers."""
    recursion, directory, environment, arguments = sys.getrecursionlimit(), os.getcwd(), dict(os.environ), sys.argv[:]
    hooks = sys.excepthook, threading.excepthook, sys.gettrace(), sys.getprofile()
    main = threading.current_thread() is threading.main_thread()
    numbers = [s for s in signal.valid_signals() if s not in (signal.SIGKILL, signal.SIGSTOP)] if main else []
    handlers = {number: signal.getsignal(number) for number in numbers}

    def undo() -> None:
        sys.setrecursionlimit(recursion)
        with contextlib.suppress(OSError):  # the folder may be gone
            os.chdir(directory)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.argv[:] = arguments
        sys.excepthook, threading.excepthook = hooks[:2]
        if sys.gettrace() is not hooks[2]:
            sys.settrace(hooks[2])
        if sys.getprofile() is not hooks[3]:
            sys.setprofile(hooks[3])
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    return undo


def module_hooks() -> Callable[[], None]:
    """Return a function that removes the global hooks that were added since."""
    places: list[dict[Any, Any]] = [
        value
        for module in (torch.nn.modules.module, sys.modules[torch.optim.Optimizer.__module__])
        for name, value in vars(module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    ]
    known = [set(place) for place in places]

    def undo() -> None:
        for place, keys in zip(places, known, strict=True):
            for key in set(place) - keys:
                del place[key]

    return undo


class Printed(io.BytesIO):
    """Memory in place of stdout and stderr. What asks for its descriptor, as faulthandler does, gets stderr's."""

    def fileno(self) -> int:
        return 2

    def close(self) -> None:
        """Keep what was printed: a run may close its stdout."""


@contextlib.contextmanager
def collected_messages(messages: list[str]) -> Iterator[None]:
    """Collect warnings, log records and printed lines, progress bars too, instead of showing them.

    What native code writes, and processes that the run starts, is not seen.
    """

    class Handler(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            try:
                messages.append(entry.getMessage())
            except Exception:  # its arguments do not fit: logging would complain, and the run would go on
                messages.append(str(entry.msg))

    root = logging.getLogger()
    level, disabled = root.level, root.manager.disable
    loggers = [root, *(x for x in root.manager.loggerDict.values() if isinstance(x, logging.Logger) and x.handlers)]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    # Not a StringIO: some scripts call sys.stdout.reconfigure().
    kept = Printed()
    printed = io.TextIOWrapper(kept, encoding="utf-8", errors="replace", newline="", write_through=True)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        warnings.simplefilter("always")
        for logger in loggers:  # Lightning's, say, print to stderr by handlers of their own
            logger.handlers[:], logger.propagate = [], True
        root.handlers[:] = [Handler()]
        root.setLevel(logging.INFO)
        if disabled:  # an adapter, or an earlier run, has silenced all loggers
            logging.disable(logging.NOTSET)
        try:
            yield
        finally:
            if root.manager.disable != disabled:
                logging.disable(disabled)
            for logger, handlers, propagate in before:
                logger.handlers[:], logger.propagate = handlers, propagate
            root.setLevel(level)
            messages.extend(str(entry.message) for entry in caught)
            text = kept.getvalue().decode("utf-8", "replace")
            messages.extend(line for line in text.splitlines() if line.strip())
