"""What a run shows while it runs: a live line on a terminal, plain lines elsewhere, both on stderr."""

import contextlib
import datetime
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from reference.training.throughput import device_peak

if TYPE_CHECKING:
    from rich.console import Console

    from reference.training.trainer import Record

WINDOW = 50  # updates that the running means go back


class Meter:
    """Running means over the last updates."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.done: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # tokens and seconds of an update
        self.arrivals: deque[float] = deque(maxlen=WINDOW + 1)

    def add(self, record: "Record") -> None:
        """Take in an update."""
        if len(self.arrivals) == 1:
            self.done.clear()  # the first update compiles, allocates and fills caches
        self.done.append((record.tokens, record.seconds))
        self.arrivals.append(self.clock())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, without evaluations and checkpoints."""
        seconds = sum(seconds for _, seconds in self.done)
        return sum(tokens for tokens, _ in self.done) / seconds if seconds > 0.0 else 0.0

    def seconds_left(self, updates: int) -> float | None:
        """Seconds that ``updates`` more will take, with their evaluations and checkpoints; None after one update."""
        if len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1) * updates


@contextlib.contextmanager
def progress(
    updates: int, log_every: int, flops_per_token: float, precision: str, console: "Console | None" = None
) -> Iterator[Callable[["Record"], None]]:
    """A callback for the Trainer that shows loss, speed, utilisation, memory and time left; on rank 0 only.

    On a terminal a live line, and above it a line every ``log_every`` updates; elsewhere only these. The live line is
    taken away on leaving, whatever the reason, so that what is printed next begins on a line of its own.

    Args:
        updates: of the whole run.
        log_every: updates between lines; the first and the last always have one.
        flops_per_token: see reference.training.throughput.
        precision: Fabric's, which decides what the card's peak is.
        console: where to. None: stderr.
    """
    from lightning.fabric.utilities import rank_zero_only
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = console or Console(stderr=True)
    live = Progress(
        BarColumn(bar_width=12), TextColumn("{task.description}", markup=False), console=console, transient=True
    )
    task = live.add_task("", total=updates)
    meter = Meter()

    def show(record: "Record") -> None:
        meter.add(record)
        text = describe(record, updates, meter, utilisation(record, meter, flops_per_token, precision))
        if console.is_terminal:
            live.start()  # with the first update: before it, nothing moves
            live.update(task, completed=record.update, description=text)
        if len(meter.arrivals) == 1 or record.update % log_every == 0 or record.update == updates:
            console.print(f"update {text}", markup=False, highlight=False, soft_wrap=True)

    try:
        yield rank_zero_only(show)
    finally:
        if live.live.is_started:  # stop() writes an empty line otherwise
            live.stop()


def utilisation(record: "Record", meter: Meter, flops_per_token: float, precision: str) -> str:
    """MFU in words, ``unknown`` for a card that is not in the table; empty on the CPU."""
    if record.memory == 0:
        return ""
    peak = device_peak(torch.device("cuda"), precision)
    if peak is None:
        return "MFU unknown"
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return f"MFU {meter.tokens_per_second * flops_per_token / (peak * ranks):.1%}"


def describe(record: "Record", updates: int, meter: Meter, utilisation: str = "") -> str:
    """One line on an update; what matters least is last, where a narrow terminal cuts it off."""
    left = meter.seconds_left(updates - record.update)
    parts = (
        f"{record.update}/{updates}: loss {record.loss:.4f}",
        "" if record.validation_loss is None else f"validation {record.validation_loss:.4f}",
        "" if left is None else f"left {datetime.timedelta(seconds=round(left))}",
        f"{meter.tokens_per_second:,.0f} tokens/s",
        utilisation,
        f"memory {record.memory / 2**30:.1f} GiB" if record.memory else "",
        f"lr {record.learning_rate:.3g}",
        f"gradient norm {record.gradient_norm:.3f}",
    )
    return ", ".join(part for part in parts if part)


class ConsoleHandler(logging.Handler):
    """Prints log records above the live line instead of through it."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record: as it is, or with its level if that is a warning or worse."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.console.print(f"{level}{record.getMessage()}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def logging_to(console: "Console", first_rank: bool = True) -> Iterator[None]:
    """Show what the logger ``reference`` says; ranks but the first only warnings.

    Without the Trainer's own line on each update: :func:`progress` says it, and more.
    """
    logger = logging.getLogger("reference")
    handler = ConsoleHandler(console)
    handler.addFilter(lambda entry: (entry.module, entry.funcName) != ("trainer", "log"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if first_rank else logging.WARNING)
    logger.propagate = False  # else the root logger, if anything configured it, would say it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
