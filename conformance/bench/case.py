"""What is measured: a case, the setting it is built for, and the step that is ready to be timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Unavailable(Exception):
    """The case cannot run here. The message is one sentence, and becomes the row's reason."""


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    """The device that is measured."""
    quick: bool = False
    """Few rounds and few cases."""

    @property
    def small(self) -> bool:
        """Tiny shapes that exercise the code: on the CPU, where no figure says anything about a GPU."""
        return self.device.type == "cpu"


@dataclass
class Prepared:
    """A step that is ready to be timed."""

    step: Callable[[], Any]
    """One measured iteration on the current stream. It must not synchronise: the clock does that around it."""
    facts: dict[str, float | str] = field(default_factory=dict)
    """Figures known beforehand. ``floor bytes`` gives the floor; ``tokens`` (of a step), ``flops_per_token``, ``card``
    and ``dense_peak`` give tokens per second and MFU (conformance.bench.throughput). ``note`` is printed below
    the table. The others are only written down."""
    reset: Callable[[], None] | None = None
    """Bring model and optimizer back to the start, in place, after the warm-up."""
    close: Callable[[], None] | None = None
    """Free what the garbage collector would not: process-wide state, compiled code, patched modules."""
    inputs: Sequence[Tensor] = ()
    """What the step reads. Refused if a tensor is constant: a GPU computes faster with zeros than with real data."""
    later_facts: Callable[[], dict[str, float | str]] | None = None
    """Figures known only after the steps: bytes of the optimizer's state, the last loss, ..."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    group: str
    """The chapter of the table: ``optimizer step``, ``training step``, ..."""
    size: str
    """The model's shape: ``gpt2-124m``, ``llama-1.2b``, ``tiny``."""
    name: str
    """The row's name: unique within group and size, and the same from run to run, because runs are compared by it."""
    build: Callable[[Setting], Prepared]
    """Build it on the device. Raises :class:`Unavailable` if the case cannot run here."""
    beside: str | None = None
    """Name of the case of the same group and size that this one is interleaved with, round by round (A B B A), so
    that drift cancels in their ratio. It stays in memory meanwhile. None: measured alone."""
    rounds: int = 30
    """Rounds at most. Fewer if they would take more than ``budget``."""
    budget: float = 1.5
    """Seconds that the timed rounds may take; at least two rounds are taken."""
    seconds: float = 5.0
    """What the whole case takes on an H100, about, with building and warm-up: for the time left."""
    graph: str = ""
    """Names the compiled code that the step runs; the same for rows that share it. Empty: it compiles nothing."""
    compiling: float = 0.0
    """How many of ``seconds`` it compiles, the first of its graph, if that was not done ahead."""
    priority: int = 1
    """Smaller numbers run first, so that a limit cuts what one misses least. The same for cases that are interleaved
    or share compiled code."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the row."""
        return self.group, self.size, self.name


# Which time a row is judged by. A training step waits for its data and its host, so the wall counts; in an optimizer's
# step the host usually runs ahead, so the device does.
HEADLINE = {"training step": "wall"}
