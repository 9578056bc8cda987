"""A clause: one rule, one pytest test. Its docstring is the requirement and is printed when it fails."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from conformance.subject import CAPABILITIES, UsageError

CHAPTERS = {
    "INIT": "initial weights",
    "OPT": "optimizer keywords",
    "DECAY": "groups and weight decay",
    "PREC": "precision",
    "EMB": "StableEmbedding",
    "ACC": "accumulation",
    "CLIP": "gradient clipping",
    "LR": "learning rate",
    "RESUME": "save and resume",
    "DATA": "order and content of data",
    "EVAL": "evaluation",
    "REPORT": "what the run reports",
    "CAUSAL": "what a logit may depend on",
    "TIE": "tied embedding and head",
}
"""Chapters in the order in which they are run and printed."""


class Violation(AssertionError):
    """A rule is broken.

    Args:
        expected: what a healthy stack shows.
        seen: what was seen instead: tensors by name, numbers, the first few of many.
    """

    def __init__(self, expected: str, seen: str) -> None:
        super().__init__(f"expected: {expected}\nseen: {seen}")
        self.expected, self.seen = expected, seen


class NotApplicable(Exception):
    """The clause cannot be judged on this machine; the message is the reason."""


@dataclass(frozen=True)
class Clause:
    """One rule of the suite."""

    id: str
    """``CHAPTER-n``, never reused."""
    requirement: str
    """One sentence: the test's docstring."""
    why: str
    """What it costs a user when the rule is broken, in one line."""
    mend: str
    """How to mend it, in one line."""
    source: str
    """Published fault, paper or documentation that the rule comes from."""
    bound: str
    """The tolerance, with the noise of healthy runs and the weakest mutant beside it."""
    level: Literal["must", "should"]
    needs: tuple[str, ...]
    """Capabilities without which the clause does not apply."""
    function: Callable[..., None]
    """The pytest test."""

    @property
    def chapter(self) -> str:
        """The part of the id before the number."""
        return self.id.partition("-")[0]


_CLAUSES: dict[str, Clause] = {}


def clause(
    identity: str,
    *,
    why: str,
    mend: str,
    source: str,
    bound: str = "bit equality",
    level: Literal["must", "should"] = "must",
    needs: tuple[str, ...] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test function a clause.

    Raises:
        ValueError: for an id that is taken or of no chapter, an unknown capability, or a test without a docstring.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        earlier = _CLAUSES.get(identity)
        if earlier is not None and earlier.function.__qualname__ != function.__qualname__:
            raise ValueError(f"the clause id {identity} is taken by {earlier.function.__qualname__}")
        if identity.partition("-")[0] not in CHAPTERS or not identity.partition("-")[2].isdigit():
            raise ValueError(f"{identity!r} is no clause id: it needs a chapter of {list(CHAPTERS)} and a number")
        unknown = [name for name in needs if name not in CAPABILITIES]
        if unknown:
            raise ValueError(f"{identity} needs {unknown}, which is no capability of {list(CAPABILITIES)}")
        requirement = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        if not requirement:
            raise ValueError(f"{identity} has no docstring, but a clause's docstring is its requirement")
        _CLAUSES[identity] = Clause(identity, requirement, why, mend, source, bound, level, needs, function)
        function.conformance_clause = identity  # type: ignore[attr-defined] # how the plugin knows a clause
        return function

    return decorate


def catalogue() -> dict[str, Clause]:
    """Every clause of the suite by id, in the order of chapters and numbers."""
    package = importlib.import_module("conformance.suites")
    for entry in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"conformance.suites.{entry.name}")
    chapters = list(CHAPTERS)
    return dict(
        sorted(_CLAUSES.items(), key=lambda item: (chapters.index(item[1].chapter), int(item[0].partition("-")[2])))
    )


def find_clauses(ids: list[str]) -> dict[str, Clause]:
    """Clauses by id or chapter; all of them if ``ids`` is empty.

    Raises:
        UsageError: for an id that does not exist.
    """
    import difflib

    everything = catalogue()
    chosen: dict[str, Clause] = {}
    for wanted in ids:
        matching = {k: c for k, c in everything.items() if wanted.upper() in (k, c.chapter)}
        if not matching:
            nearest = difflib.get_close_matches(wanted.upper(), [*everything, *CHAPTERS], n=1, cutoff=0.0)
            raise UsageError(
                f"there is no clause {wanted!r}; the nearest is {nearest[0]}. Chapters: {', '.join(CHAPTERS)}."
            )
        chosen |= matching
    return {key: value for key, value in everything.items() if not ids or key in chosen}


def quoted(names: Any, limit: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(str(name) for name in names[:limit]) + more
