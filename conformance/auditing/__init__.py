"""Audit any training run with no line changed: watch its first updates, and say what is wrong.

python -m conformance audit -- train.py args ...    a script; see ``python -m conformance audit --help``
with conformance.audit() as verdict: ...            a block of code, in a notebook or a test
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from conformance.auditing.verdict import Verdict


def audit(
    updates: int = 4,
    then: Literal["stop", "go-on"] = "stop",
    expect: str = "",
    allow: Sequence[str] = (),
    strict: bool = False,
) -> "AbstractContextManager[Verdict]":
    """Watch the training inside a ``with`` block, and judge its first updates.

    >>> with audit() as verdict:
    ...     pass
    >>> verdict.faults
    []

    The verdict is complete when the block ends; ``print(verdict)`` shows it. Build model, optimizer and data inside the
    block if you can: the audit notices a skipped initialisation only in a model that is built inside.

    Args:
        updates: how many updates to watch.
        then: ``stop`` ends the block after them; ``go-on`` lets it go on unwatched.
        expect: what you expect of the run, as in ``lr=3e-4,clip=1.0,tied``; see ``--expect``.
        allow: rules that may find something, each as ``RULE=reason``.
        strict: count advice as a fault: ``verdict.failed`` is then true.

    Raises:
        UsageError: for an unknown expectation or rule, and for fewer than one update.
    """
    from conformance.auditing.judging import allowances
    from conformance.auditing.rules.expected import parse
    from conformance.auditing.run import audited
    from conformance.errors import UsageError

    if updates < 1:
        raise UsageError(f"updates is {updates}: an audit watches one update or more.")
    return audited(updates, then, parse(expect), allowances(allow), strict)
