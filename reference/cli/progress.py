"""What a run shows while it runs, on stderr: the log, and below it on a terminal a live line."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from reference.errors import printable
from reference.heartbeat import heartbeat

if TYPE_CHECKING:
    from rich.console import Console

    from reference.training.trainer import Record


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr what is waited for: with a moving sign on a terminal, with a line every few seconds elsewhere."""
    from rich.console import Console

    console, began = Console(stderr=True), time.monotonic()
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield
        return

    def tell() -> None:
        seconds = time.monotonic() - began
        say(console, f"{what}: {seconds:.0f} s so far")

    with heartbeat(tell):
        yield


@contextlib.contextmanager
def live_line(updates: int, console: "Console") -> Iterator[Callable[["Record"], None]]:
    """Yield a callback for the Trainer that keeps a live line on a terminal, on rank 0 only.

    The line is taken away on leaving, whatever the reason, so that what is printed next begins on a line of its own.

    Args:
        updates: of the whole run.
        console: where to.
    """
    from lightning.fabric.utilities import rank_zero_only
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(), text)
    live = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = live.add_task("starting", total=updates)
    if getattr(rank_zero_only, "rank", 0) == 0:
        live.start()

    def show(record: "Record") -> None:
        rate = f"{record.tokens / record.seconds:,.0f} tokens/s" if record.seconds else ""
        live.update(task, completed=record.update, description=f"loss {record.loss:.4f}, {rate}")

    try:
        yield rank_zero_only(show)
    finally:
        if live.live.is_started:  # stop() writes an empty line otherwise
            live.stop()


def say(console: "Console", text: str) -> None:
    """Print text as it is. Where stderr cannot be written any more, nothing is said: no message is worth a run."""
    with contextlib.suppress(OSError, SystemExit):  # rich makes the second of a pipe that nobody reads
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Prints log records above the live line instead of through it."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record: as it is, or with its level if that is a warning or worse."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(self.console, f"{level}{record.getMessage()}")


def is_about_the_run(record: logging.LogRecord) -> bool:
    """Return False for what bitsandbytes logs on a CPU when it is imported: that a package could be added."""
    return "pip install kernels" not in record.getMessage()


@contextlib.contextmanager
def logging_to(console: "Console", first_rank: bool = True) -> Iterator[None]:
    """Show what the logger ``reference`` says; ranks but the first only warnings."""
    logger = logging.getLogger("reference")
    handler = ConsoleHandler(console)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if first_rank else logging.WARNING)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(is_about_the_run)
    logger.propagate = False  # else the root logger, if anything configured it, would say it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
