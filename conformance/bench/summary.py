"""The results of a run: a row for each case, the card, and the file ``summary.json`` that holds them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from conformance.bench.bootstrap import Interval
from conformance.bench.case import AGAINST_ITSELF, Case, Facts, judged_by
from conformance.bench.plain import Positive, from_plain
from conformance.errors import UsageError
from conformance.reading import read_json

SCHEMA = 2
SMALL = "CPU, small: no figure of this run says anything about a GPU"

Key = tuple[str, str, str]
"""Group, size and name of a row: what identifies it from run to run."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % interval."""

    ratio: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True)
class Beside(Ratio):
    """The ratio of a row's time to that of the row it was interleaved with, paired round by round."""

    with_: str  # name of that row
    beside_ms: Positive  # its median of the judged time, in these rounds
    beside_host_ms: Positive  # its median of the host's work, in these rounds


@dataclass(frozen=True)
class Samples:
    """Every round, in milliseconds."""

    device: tuple[Positive, ...] = ()
    wall: tuple[Positive, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one case, or why nothing was."""

    group: str
    size: str
    name: str
    device_ms: Interval | None = None
    """Time on the device. Where it is judged, the host has a lead when it is taken (conformance.bench.measure)."""
    wall_ms: Interval | None = None  # time on the host's clock, from an idle device to an idle device
    host_ms: Positive | None = None  # median of the host's work for a step
    waits_for_host: bool | None = None
    """Whether waiting for the host is in the device time; None where the wall time is judged."""
    rounds: int = 0
    warm_up: int = 0  # calls of the warm-up
    facts: Facts  # settings, and figures that only some rows have, as the case gave them
    floor_ms: Positive | None = None  # the fact ``floor bytes`` over the card's copy bandwidth
    share_of_floor: Positive | None = None  # the floor over the device time
    tokens_per_second: Positive | None = None  # by the wall time
    mfu: Positive | None = None  # model FLOPs utilisation with the whole attention counted, as a share of 1
    mfu_causal: Positive | None = None  # the same with the causal half of the attention
    peak_allocated: int | None = None  # peak of the bytes in tensors, above what there was before the case was built
    peak_reserved: int | None = None
    """Peak of the bytes that the allocator held; None where the row beside it hides too much of them."""
    interleaved: Beside | None = None
    doubts: tuple[str, ...] = ()  # why the figures should not be believed
    samples_ms: Samples = field(default_factory=Samples)
    unavailable: str | None = None  # why the case was not measured; None if it was

    def __post_init__(self) -> None:
        if self.unavailable is not None:
            return
        lacking = [name for name in ("device_ms", "wall_ms", "host_ms") if getattr(self, name) is None]
        lacking += [] if self.samples_ms.device and self.samples_ms.wall else ["samples_ms"]
        if judged_by(self.group) == "device" and self.waits_for_host is None:
            lacking.append("waits_for_host")
        if lacking:
            raise ValueError(f"has no {lacking[0]!r}, although it was measured")

    @property
    def key(self) -> Key:
        """What identifies the row from run to run."""
        return self.group, self.size, self.name

    @property
    def measured(self) -> bool:
        """Whether the row has figures."""
        return self.unavailable is None

    @property
    def judged(self) -> Interval:
        """The time by which the row is judged, in milliseconds. Raises ValueError if it was not measured."""
        found = self.wall_ms if judged_by(self.group) == "wall" else self.device_ms
        if found is None:
            raise ValueError(f"{self.name} was not measured: {self.unavailable}")
        return found

    @property
    def judged_samples(self) -> tuple[float, ...]:
        """The rounds of that time."""
        return self.samples_ms.wall if judged_by(self.group) == "wall" else self.samples_ms.device

    def number(self, fact: str) -> float | None:
        """Return a fact that is a number; None if the row does not have it."""
        value = self.facts.get(fact)
        return None if isinstance(value, str) else value

    def text(self, fact: str) -> str:
        """Return a fact that is a text; empty if the row does not have it."""
        value = self.facts.get(fact)
        return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class Card:
    """What the card can do at most."""

    name: str  # as CUDA gives it
    copy_bandwidth: Positive  # bytes per second, read and written, of a copy far larger than the L2 cache
    bf16_rate: Positive
    """FLOP/s of a large product of random bfloat16 matrices."""
    dense_peak: Positive | None = None
    """FLOP/s that the vendor states for bfloat16 without sparsity; None where it is not known."""
    noise: Ratio | None = None
    """The time of a step over its own time, interleaved with itself; None if it was not measured."""
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole run. A new field is an addition; a change is a new schema."""

    schema: int = SCHEMA
    label: str | None = None  # what to know before anything else: that the run was small
    environment: Mapping[str, str]  # versions and machine
    card: Card
    quick: bool = False
    complete: bool = True  # whether these are all rows that were asked for
    seconds: Positive | None = None  # what the run took, imports and all
    rows: tuple[Row, ...]  # in the order in which they ran

    @property
    def measured(self) -> list[Row]:
        """The rows that have figures."""
        return [row for row in self.rows if row.measured]


def missing(case: Case, reason: str) -> Row:
    """Return the row of a case that was not measured."""
    return Row(group=case.group, size=case.size, name=case.name, facts={}, unavailable=reason)


def noise_of(rows: Iterable[Row]) -> Ratio | None:
    """Return the ratio of the row that measured a step against itself; None if there is none."""
    for row in rows:
        if row.name.endswith(AGAINST_ITSELF) and row.interleaved is not None:
            return Ratio(row.interleaved.ratio, row.interleaved.low, row.interleaved.high)
    return None


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows by group and size, wherever they stand: they ran in the order of their priority."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.group, row.size), []).append(row)
    return dict(sorted(found.items(), key=lambda entry: entry[0][0]))  # sizes as they came


def read_summary(path: Path) -> Summary:
    """Read ``summary.json``, or the one in a folder.

    Raises:
        UsageError: if the file cannot be read, is not a summary, or is damaged.
    """
    path = path / "summary.json" if os.path.isdir(path) else path
    found = read_json(path, "summary")
    if not isinstance(found, dict) or not {"schema", "environment", "card", "rows"} <= found.keys():
        raise UsageError(f"the file {path} is not a summary of the bench: give the summary.json of an earlier run.")
    if found["schema"] != SCHEMA:
        raise UsageError(
            f"the summary {path} has schema {found['schema']}, but this release reads {SCHEMA}: run the bench again."
        )
    try:
        return from_plain(Summary, found, "summary")
    except ValueError as error:
        raise UsageError(
            f"the summary {path} is damaged: {error}. Give the file that the bench wrote, or run the bench again."
        ) from error
