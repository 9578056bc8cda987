"""What a command shows while it works, on stderr."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from conformance.clause import CHAPTERS, Clause
from conformance.report.result import plain

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 5.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def waiting(what: str, console: "Console") -> Iterator[None]:
    """Say what is waited for: with a moving sign on a terminal, with a line every few seconds elsewhere."""
    if console.is_terminal:
        from rich.markup import escape

        with console.status(f"{escape(what)} ..."):
            yield
        return
    over, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not over.wait(EVERY):
            console.out(f"{what}: {time.monotonic() - began:.0f} s so far", highlight=False)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def shown(clauses: Iterable[Clause], console: "Console", name: str) -> Iterator[Clause]:
    """Yield clauses to judge, and show progress: a bar on a terminal; elsewhere a line per chapter, or more often."""
    listed = list(clauses)
    if console.is_terminal:
        from rich.markup import escape
        from rich.progress import Progress

        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("", total=len(listed))
            for clause in listed:
                bar.update(task, description=f"Judging {escape(plain(name))}: {clause.id}", refresh=True)
                yield clause
                bar.advance(task)
        return
    last = time.monotonic()
    for number, clause in enumerate(listed):
        yield clause
        ends = number + 1 == len(listed) or listed[number + 1].chapter != clause.chapter
        if ends or time.monotonic() - last >= EVERY:
            title = f"{clause.chapter:6}  {CHAPTERS[clause.chapter]}"
            console.out(f"{title:41} judged: {number + 1} of {len(listed)}", highlight=False)
            last = time.monotonic()
