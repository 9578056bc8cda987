"""Watching a training run: the recorder, and the trace that it leaves.

``trace`` is plain data and imports nothing heavy; ``record`` imports PyTorch when it is called.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from conformance.recipe import Dropping
from conformance.recording.trace import Trace


def record(
    directory: Path | None = None,
    zero_gradients: bool = False,
    rank: int = 0,
    nan_gradient: int | None = None,
    keep: Path | None = None,
    dropping: Dropping = "everywhere",
) -> AbstractContextManager[Trace]:
    """Record the training run inside a ``with`` block.

    >>> with record() as trace:
    ...     pass
    >>> trace.updates
    []

    Everything is put back on exit, also after an exception; recordings may be nested or repeated.

    Args:
        directory: where the run writes its files; None: files are not recorded.
        zero_gradients: zero every gradient on entry to ``step``, before anything else sees it.
        rank: only kept in the trace.
        nan_gradient: the update, counted from 0, whose gradients get a NaN when their backward has ended.
        keep: folder for copies of what the run writes, so that a checkpoint is known even if it is written over.
        dropping: where dropout acts; elsewhere it keeps every activation: see conformance.recording.dropping.
    """
    from conformance.recording.recorder import recording

    return recording(directory, zero_gradients, rank, nan_gradient, keep, dropping)
