"""Rounds of a step, interleaved with those of another so that drift cancels, and with a lead of the host if asked."""

import gc
from collections.abc import Callable
from statistics import median

from conformance.bench.clock import Clock, Round

LEAD, LEAST_LEAD = 1.5, 1e-3  # times what the host needs for the step, and seconds on top: short ones vary more
PROBES = 3
LITTLE = 0.1  # of a step's device time


class Interleaved:
    """A step's rounds on its clock, each next to one of the step beside it: A B B A.

    In A B A B the second would always be the later one, and a card that slows down slows it down more.
    """

    lead = beside_lead = 0.0
    """Seconds by which the host is ahead of the device in a round of the step, and of the one beside it."""

    def __init__(
        self,
        step: Callable[[], object],
        clock: Clock,
        beside: Callable[[], object] | None,
        before: tuple[int, int] = (0, 0),
    ) -> None:
        """Begin without rounds; ``before`` are bytes allocated and reserved that do not count as the step's."""
        self.step, self.clock, self.beside, self.before = step, clock, beside, before
        self.other = Clock(clock.device)  # so that its rounds are kept apart
        self.peaks = [0, 0]

    def setup(self) -> None:
        """Do all that comes before a round of the step."""
        self._round_beside()
        self._ready()
        self.clock.lead = self.lead

    def teardown(self) -> None:
        """Do all that comes after it."""
        for place, value in enumerate(self.clock.device.peak()):
            self.peaks[place] = max(self.peaks[place], value - self.before[place])
        self._round_beside()

    def round(self) -> None:
        """Time one round, with what comes before and after it."""
        self.setup()
        time_without_gc(self.clock, self.step)
        self.teardown()

    def take(self) -> tuple[list[Round], list[Round]]:
        """Return the rounds so far, of the step and of the one beside it, and forget them."""
        found = list(self.clock.rounds), list(self.other.rounds)
        self.clock.rounds.clear()
        self.other.rounds.clear()
        return found

    def lead_host(self, rounds: list[Round]) -> None:
        """Give the host a lead from now on, if it can get ahead of the device at all.

        It cannot where a step waits for the device in its midst, as bitsandbytes' 8-bit ones do for every parameter, or
        where it launches more than the driver queues and slower than the device works. Such a step begins idle, as in
        the ``rounds`` so far.
        """
        self.lead = lead_for(rounds)
        for _ in range(PROBES):
            self.round()
        probes, _ = self.take()
        if waits_for_host(probes, self.lead):
            self.lead = 0.0

    def _round_beside(self) -> None:
        if self.beside is not None and len(self.clock.rounds) % 2 == 0:
            self._ready()
            self.other.lead = self.beside_lead
            time_without_gc(self.other, self.beside)

    def _ready(self) -> None:
        # The same before both: a host that comes from other work, or a device that has idled longer, is not as fast.
        device = self.clock.device
        device.flush()
        device.synchronize()
        device.reset_peak()


def lead_for(rounds: list[Round]) -> float:
    """Return the seconds that the host needs to launch all of a step before the device begins, from rounds of it."""
    return LEAD * median(r.host for r in rounds) + LEAST_LEAD if rounds else 0.0


def waits_for_host(rounds: list[Round], lead: float) -> bool:
    """Return whether the device had to wait although the host had a lead.

    It did if the host was still at it when the lead ended, and had hardly left the device anything to do when the call
    returned. The first alone says nothing of a long step: the host stays ahead while the device works, or has been held
    up by a full queue of launches.
    """
    used_up = median(r.host for r in rounds) > lead
    return used_up and median((r.wall - r.host) / r.device for r in rounds) < LITTLE


def time_without_gc(clock: Clock, step: Callable[[], object]) -> None:
    """Time one round as pytest-benchmark does it with --benchmark-disable-gc."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        clock.time(step)
    finally:
        if enabled:
            gc.enable()
