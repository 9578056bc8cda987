"""A sign of life, every few seconds, from what takes long."""

import contextlib
import threading
from collections.abc import Callable, Iterator

EVERY = 5.0  # seconds


@contextlib.contextmanager
def heartbeat(tell: Callable[[], None]) -> Iterator[None]:
    """Call ``tell`` every few seconds, from a thread, until the block ends."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(EVERY):
            tell()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
