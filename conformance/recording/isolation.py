"""What surrounds a recording: one thread, nothing compiled, NaN in fresh memory, messages collected."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def quiet_and_deterministic() -> Iterator[None]:
    """One thread, no compilation, NaN in uninitialised memory, and the caller's random state unharmed."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # set by its module
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined] # as above
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined] # as above


class Printed(io.BytesIO):
    """Memory in place of stdout and stderr. What asks for its descriptor, as faulthandler does, gets stderr's."""

    def fileno(self) -> int:
        return 2


@contextlib.contextmanager
def collected_messages(messages: list[str]) -> Iterator[None]:
    """Collect warnings, log records and printed lines, progress bars too, instead of showing them.

    What native code writes, and processes that the run starts, is not seen.
    """

    class Handler(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            messages.append(entry.getMessage())

    root = logging.getLogger()
    level = root.level
    loggers = [root, *(x for x in root.manager.loggerDict.values() if isinstance(x, logging.Logger) and x.handlers)]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    # Not a StringIO: some scripts call sys.stdout.reconfigure().
    printed = io.TextIOWrapper(Printed(), encoding="utf-8", errors="replace", newline="", write_through=True)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        warnings.simplefilter("always")
        for logger in loggers:  # Lightning's, say, print to stderr by handlers of their own
            logger.handlers[:], logger.propagate = [], True
        root.handlers[:] = [Handler()]
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            for logger, handlers, propagate in before:
                logger.handlers[:], logger.propagate = handlers, propagate
            root.setLevel(level)
            messages.extend(str(entry.message) for entry in caught)
            text = printed.buffer.getvalue().decode("utf-8", "replace")
            messages.extend(line for line in text.splitlines() if line.strip())
