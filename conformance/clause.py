"""A clause: one rule, one pytest test. Its docstring is the requirement and is printed when it fails."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from conformance.capabilities import CAPABILITIES
from conformance.errors import NotApplicable as NotApplicable  # adapters and tests of 0.1 import both from here
from conformance.errors import UsageError
from conformance.errors import Violation as Violation
from conformance.runs import Runs

CHAPTERS = {
    "INIT": "initial weights",
    "MODEL": "the function that the model computes",
    "OPT": "optimizers and their keywords",
    "DECAY": "groups and weight decay",
    "LOSS": "what is minimised",
    "PREC": "precision",
    "EMB": "StableEmbedding",
    "DROP": "dropout",
    "ACC": "accumulation",
    "CLIP": "gradient clipping",
    "LR": "learning rate",
    "RESUME": "save and resume",
    "DATA": "order and content of data",
    "EVAL": "evaluation",
    "DIST": "several ranks",
    "REPORT": "what the run reports",
    "CAUSAL": "what a logit may depend on",
    "TIE": "tied embedding and head",
}
"""Chapters in the order in which they are run and printed."""

PACKAGES = {"bitsandbytes": "optimizers", "grokadamw": "optimizers"}
"""Packages that clauses may need, and the extra that installs each."""

Test = Callable[[Runs], None]


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
    """The tolerance, with the noise of healthy runs and what the weakest mutant shows."""
    level: Literal["must", "should"]
    since: str
    """The version of the suite that has the clause first."""
    needs: tuple[str, ...]
    """Capabilities without which the clause does not apply."""
    packages: tuple[str, ...]
    """Packages that the clause trains with."""
    test: Test
    """The pytest test."""
    last: bool = False
    """Judged after all others where there is a GPU: a device-side assert leaves it useless for the whole process."""

    @property
    def chapter(self) -> str:
        """The part of the id before the number."""
        return chapter_and_number(self.id)[0]

    @property
    def part(self) -> Literal["core", "extension"]:
        """``extension`` if only stacks with an option that most do not have can be asked."""
        return "extension" if any(CAPABILITIES[need].extension for need in self.needs) else "core"


_CLAUSES: dict[str, Clause] = {}


def clause(
    identity: str,
    *,
    why: str,
    mend: str,
    source: str,
    since: str,
    bound: str = "bit equality",
    level: Literal["must", "should"] = "must",
    needs: tuple[str, ...] = (),
    packages: tuple[str, ...] = (),
    last: bool = False,
) -> Callable[[Test], Test]:
    """Make a test function a clause.

    Raises:
        ValueError: for an id that is taken or of an unknown chapter, an unknown capability or package, or a test
            without a docstring.
    """

    def decorate(test: Test) -> Test:
        earlier = _CLAUSES.get(identity)
        if earlier is not None and earlier.test.__qualname__ != test.__qualname__:
            raise ValueError(f"the clause id {identity} is taken by {earlier.test.__qualname__}")
        if identity.partition("-")[0] not in CHAPTERS or not identity.partition("-")[2].isdigit():
            raise ValueError(f"{identity!r} is not a clause id: give a chapter of {list(CHAPTERS)} and a number")
        unknown = [name for name in needs if name not in CAPABILITIES] + [p for p in packages if p not in PACKAGES]
        if unknown:
            raise ValueError(f"{identity} needs {unknown}: not a capability of {list(CAPABILITIES)}, nor a package")
        requirement = requirement_of(inspect.getdoc(test))
        if not requirement:
            raise ValueError(f"{identity} has no docstring, but a clause's docstring is its requirement")
        _CLAUSES[identity] = Clause(
            identity, requirement, why, mend, source, bound, level, since, needs, packages, test, last
        )
        test.conformance_clause = identity  # type: ignore[attr-defined] # how the plugin knows a clause
        return test

    return decorate


def requirement_of(docstring: str | None) -> str:
    """Return the first paragraph of a clause's docstring, as one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def catalogue() -> dict[str, Clause]:
    """Return every clause of the suite by id, in the order of chapters and numbers."""
    package = importlib.import_module("conformance.suites")
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.name.startswith("test_"):
            importlib.import_module(f"conformance.suites.{entry.name}")
    return {identity: _CLAUSES[identity] for identity in sorted(_CLAUSES, key=in_order)}


def in_order(identity: str) -> tuple[int, int]:
    """Return a sort key for clause ids: chapters as in CHAPTERS, unknown ones last, then numbers."""
    chapter, number = chapter_and_number(identity)
    return list(CHAPTERS).index(chapter) if chapter in CHAPTERS else len(CHAPTERS), number


def chapter_and_number(identity: str) -> tuple[str, int]:
    """Return ``("OPT", 7)`` for "OPT-7"."""
    chapter, _, number = identity.partition("-")
    return chapter, int(number)


def find_clauses(ids: Iterable[str], everything: Mapping[str, Clause] | None = None) -> dict[str, Clause]:
    """Return clauses by id or chapter; all of them if ``ids`` is empty.

    Args:
        ids: of clauses or chapters, in capitals or not.
        everything: the catalogue to look in; by default the one that can be judged.

    Raises:
        UsageError: for an id that does not exist.
    """
    everything, ids = catalogue() if everything is None else everything, list(ids)
    chosen: set[str] = set()
    for wanted in ids:
        matching = {k for k, c in everything.items() if wanted.upper() in (k, c.chapter)}
        if not matching:
            nearest = difflib.get_close_matches(wanted.upper(), [*everything, *CHAPTERS], n=1, cutoff=0.0)
            raise UsageError(
                f"unknown clause {wanted!r}: the nearest is {nearest[0]}. Chapters: {', '.join(CHAPTERS)}."
            )
        chosen |= matching
    return {key: value for key, value in everything.items() if not ids or key in chosen}
