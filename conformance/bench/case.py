"""What is measured: a case, the setting it is built for, and the step that is ready to be timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

OPTIMIZER_STEP, TRAINING_STEP, FINE_TUNING_STEP = "optimizer step", "training step", "fine-tuning step"
AGAINST_ITSELF = "against itself"  # the name of the row that gives the noise floor ends in it

Facts = dict[str, float | str]
Which = Literal["device", "wall"]


def judged_by(group: str) -> Which:
    """Return the time by which the rows of a group are judged.

    A training step waits for its data and its host, so the wall counts. In an optimizer's step the host usually runs
    ahead, so the device does.
    """
    return "wall" if group in (TRAINING_STEP, FINE_TUNING_STEP) else "device"


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device  # the device that is measured
    quick: bool = False  # few rounds and few cases

    @property
    def small(self) -> bool:
        """Whether shapes are tiny: on the CPU, where the code is exercised and no figure says anything about a GPU."""
        return self.device.type == "cpu"


@dataclass
class Prepared:
    """A step that is ready to be timed."""

    step: Callable[[], object]
    """One measured iteration on the current stream. It must not synchronise: the clock does that around it."""
    facts: Facts = field(default_factory=dict)
    """Figures known beforehand. ``floor bytes`` gives the floor; ``tokens`` (of a step) and ``flops_per_token`` give
    tokens per second and MFU (conformance.bench.figures). ``note`` is printed below the table."""
    reset: Callable[[], object] = lambda: None
    """Brings model and optimizer back to the start, in place, after the warm-up."""
    close: Callable[[], object] = lambda: None
    """Frees what the garbage collector would not: process-wide state, compiled code, patched modules."""
    inputs: Sequence[Tensor] = ()
    """What the step reads. A constant tensor is refused: a GPU computes faster with zeros than with real data."""
    later_facts: Callable[[], Facts] = dict
    """Figures known only after the steps: bytes of the optimizer's state, the last loss, ..."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    group: str  # the chapter of the table: ``optimizer step``, ``training step``
    size: str  # the model's shape: ``gpt2-124m``, ``llama-1.2b``, ``tiny``
    name: str
    """The row's name: unique within group and size, and the same from run to run, because runs are compared by it."""
    build: Callable[[Setting], Prepared]
    """Builds it on the device. Raises :class:`Unavailable` if the case cannot run here."""
    beside: str | None = None
    """Name of the case of the same group and size that this one is interleaved with, round by round (A B B A), so
    that drift cancels in their ratio. It stays in memory meanwhile. None: measured alone."""
    rounds: int = 30
    """Rounds at most. Fewer if they would take more than ``budget``."""
    budget: float = 1.5  # seconds that the timed rounds may take; at least two rounds are taken
    seconds: float = 5.0
    """What the whole case takes on an H100, with building and warm-up: for the estimate of the time left."""
    graph: str = ""
    """Names the compiled code that the step runs; the same for rows that share it. Empty: it compiles nothing."""
    compiling: float = 0.0  # how many of ``seconds`` the first case of a graph compiles, if that was not done ahead
    priority: int = 1
    """Smaller numbers run first, so that a limit cuts what is missed least. The same for cases that are interleaved
    or share compiled code."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the row."""
        return self.group, self.size, self.name
