"""What the fuzzers share: so many seeded cases, values of all kinds, damage to files, and a clock.

Each of twelve kinds of input has CASES cases in the default tier and MORE in the slow one: 204 and 2,004 together.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

W = TypeVar("W")
CASES, MORE = 17, 167
LIMIT = 5  # seconds of the processor, and ten times as many by the clock
SENTENCE = 400

HUGE = "9" * 5000
ODD = ["", "null", "true", "[]", "{}", "[[[[", "{a: ", "&a [*a]", "*a", "!!python/name:os.system", "\0", "../../x"]
ODD += ["nan", ".inf", "-1", "0", "1", "2", "1e400", "1e-3", HUGE, str(1 << 40), "9" * 20, "[1, 2]", "{lr: x}"]
ODD += ["{1: 2}", "x" * 300, "2020-01-01", "- " * 3000, "auto", "/dev/zero", "text.txt", "data", "run", "bytes"]
ODD += ["%s{0}", "\x1b[31m", "[/bold]"]
texts = st.one_of(st.sampled_from(ODD), st.text(max_size=12))
numbers = st.sampled_from([-1, 0, 1, 2, 3, 1 << 40, 1 << 63, 10**20])
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
damages = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("add"), st.floats(0, 1), st.integers(1, 9)),
    st.tuples(st.just("zero"), st.floats(0, 1), st.integers(1, 99)),
)


def damage(path: Path, kind: str, share: float, number: int) -> None:
    """Damage a file at a share of its length."""
    content = bytearray(path.read_bytes())
    place = min(int(share * len(content)), max(0, len(content) - 1))
    if kind == "flip" and content:
        content[place] ^= 1 << number
    elif kind == "cut":
        del content[place:]
    elif kind == "add":
        content[place:place] = b"\xff" * number
    else:
        content[place : place + number] = bytes(number)
    path.write_bytes(content)


def fuzzed(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on so many cases, a function of the seed alone, in the default and in the slow tier.

    The test is given ``world``, a fixture of its file, and what was drawn.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize(
            "cases", [pytest.param(CASES, id="some"), pytest.param(MORE, id="many", marks=pytest.mark.slow)]
        )
        def run(cases: int, world: object) -> None:
            checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
            bounded = settings(
                max_examples=cases, derandomize=True, deadline=None, database=None, suppress_health_check=checks
            )
            bounded(given(st.tuples(*strategies))(lambda drawn: test(world, *drawn)))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return cast("Callable[..., None]", run)

    return decorate


class Hang(BaseException):
    """Raised by the clock; not an Exception, so that nothing mistakes it for one."""


@contextlib.contextmanager
def clock() -> Iterator[None]:
    """Raise Hang after LIMIT seconds of the processor, or ten times as many of waiting."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    before = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, 10 * LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before):
            signal.signal(number, handler)


def listing(root: Path, apart: Path) -> list[str]:
    """All that lies below a folder, and not in the part of it where a case may write."""
    return sorted(str(path) for path in root.rglob("*") if not path.is_relative_to(apart))
