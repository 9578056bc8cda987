"""A report: what was found for one subject, as all forms of it take it, and as JSON of schema 1.

A new field is an addition; renaming or removing one is a new schema.
"""

import contextlib
import json
import os
import re
import shlex
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance import reading
from conformance.clause import Clause
from conformance.errors import UsageError
from conformance.session import BAD, OUTCOMES, Result
from conformance.subject import Subject

SCHEMA = 1


@dataclass(frozen=True)
class Verdict:
    """What was found for one clause."""

    id: str
    level: str
    requirement: str
    outcome: str
    expected: str = ""
    seen: str = ""
    reason: str = ""
    seconds: float = 0.0
    since: str = "0.1"
    part: str = "core"
    traceback: str = ""
    """For ``--verbose``; not in the file."""


@dataclass(frozen=True)
class Report:
    """What was found for one subject."""

    name: str
    version: str
    spec: str
    """What ``--subject`` was."""
    environment: Mapping[str, str]
    partial: bool
    """Not all clauses of the suite were judged."""
    verdicts: Mapping[str, Verdict]
    """By clause id, in the order of the suite."""
    as_of: str | None = None

    @property
    def failed(self) -> bool:
        """Whether any outcome makes the exit code 1."""
        return any(verdict.outcome in BAD for verdict in self.verdicts.values())

    def verdict(self, clause: Clause) -> Verdict:
        """Return what was found for a clause; also for one that this report does not have."""
        missing = Verdict(clause.id, clause.level, clause.requirement, "not judged", part=clause.part)
        return self.verdicts.get(clause.id, missing)

    def count(self, clauses: Iterable[Clause]) -> Counter[str]:
        """Return how many of some clauses have each outcome."""
        return Counter(self.verdict(clause).outcome for clause in clauses)

    def summary(self) -> dict[str, int]:
        """Return how many clauses have each outcome; all six are named."""
        counted = Counter(verdict.outcome for verdict in self.verdicts.values())
        return {outcome: counted[outcome] for outcome in OUTCOMES}

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "schema": SCHEMA,
            "subject": {"name": self.name, "version": self.version, "as_of": self.as_of},
            "environment": {**self.environment, "judged as": self.spec},
            "partial": self.partial,
            "summary": self.summary(),
            "clauses": [
                {field: getattr(verdict, field) for field in (*TEXTS, "seconds", *NEW_TEXTS)}
                for verdict in self.verdicts.values()
            ],
        }


TEXTS = ("id", "level", "requirement", "outcome", "expected", "seen", "reason")
NEW_TEXTS = {"since": "0.1", "part": "core"}
"""Fields added since 0.1, and what an older file is taken to say."""
FIELDS = {"subject": dict, "environment": dict, "partial": bool, "summary": dict, "clauses": list}


@dataclass(frozen=True)
class Named:
    """Who is judged, as it called itself before its first run: afterwards it may call itself anything."""

    name: str
    version: str
    as_of: str | None

    @classmethod
    def of(cls, subject: Subject) -> "Named":
        """Return what a subject calls itself."""
        return cls(plain(subject.name), plain(subject.version), getattr(subject, "as_of", None))


def report_of(
    subject: Named, spec: str, results: Iterable[Result], everything: Sequence[str], facts: Mapping[str, str]
) -> Report:
    """Return the report on what a session found.

    Args:
        subject: that was judged.
        spec: what ``--subject`` was.
        results: in any order.
        everything: ids of all clauses of the suite, in their order.
        facts: versions and machine.
    """
    found = {result.clause.id: verdict_of(result) for result in results}
    return Report(
        subject.name,
        subject.version,
        plain(spec),
        facts,
        set(found) != set(everything),
        {identity: found[identity] for identity in everything if identity in found},
        subject.as_of,
    )


def verdict_of(result: Result) -> Verdict:
    """Return a result as plain data."""
    clause = result.clause
    return Verdict(
        clause.id,
        clause.level,
        clause.requirement,
        result.outcome,
        plain(result.expected),
        plain(result.seen),
        plain(result.reason),
        round(result.seconds, 3),
        clause.since,
        clause.part,
        plain(result.traceback),
    )


def plain(text: str) -> str:
    """Return text that neither a terminal nor an encoder stumbles over: control codes and lone surrogates escaped."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def repeat_command(spec: str, identity: str) -> str:
    """Return the command that judges just one clause."""
    return f"python -m conformance run --subject {shlex.quote(spec)} --clause {identity}"


# writing -----------------------------------------------------------------------------------------------------------


def require_writable(path: Path) -> Path:
    """Return where a report will be written, whatever the run does to the working directory.

    Raises:
        UsageError: if it cannot be written there; now, rather than after the run.
    """
    try:
        path = Path(os.path.realpath(path))  # a link is followed, not replaced
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        parent = path.parent.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long; NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"the report {plain(str(path))} cannot be written: {reason}.") from error
    if path.is_symlink():
        raise UsageError(f"the report {path} is a link that leads to itself: give the path of a file.")
    if stat.S_ISDIR(mode):
        raise UsageError(f"the report {path} is a folder: give the path of a file.")
    if not stat.S_ISREG(mode):
        raise UsageError(f"the report {path} is not a regular file: give the path of one.")
    if not parent:
        raise UsageError(f"the report {path} cannot be written: there is no folder {path.parent}.")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("r+b").close()
    except OSError as error:
        raise UsageError(f"the report {path} cannot be written: {(error.strerror or 'it failed').lower()}.") from error
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON, whole or not at all, and return where it lies.

    Results are not lost: where ``path`` cannot be written any more, they go into a temporary file.
    """
    try:
        replace_json(path, content)
        return path
    except OSError:
        descriptor, name = tempfile.mkstemp(prefix="conformance-", suffix=".json")
        os.close(descriptor)
        replace_json(Path(name), content)
        return Path(name)


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. Raises OSError if it cannot be written."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# reading -----------------------------------------------------------------------------------------------------------


def read_report(path: Path) -> Report:
    """Read a result file of schema 1.

    Raises:
        UsageError: for a file that cannot be read, is not JSON, or is not a result.
    """
    found = read_json(path, "result file")
    for field, kind in FIELDS.items():
        demand(isinstance(found.get(field), kind), f"the result file {path} has no {field!r}, a {kind.__name__}.")
    subject, facts = found["subject"], {str(key): str(value) for key, value in found["environment"].items()}
    name, version = subject.get("name"), subject.get("version")
    demand(isinstance(name, str) and isinstance(version, str), f"the result file {path} names no subject.")
    verdicts: dict[str, Verdict] = {}
    for number, row in enumerate(found["clauses"], 1):
        verdict = read_verdict(row, f"clause {number} of the result file {path}", verdicts)
        verdicts[verdict.id] = verdict
    spec = facts.get("judged as", "your_module:Adapter")
    return Report(name, version, spec, facts, found["partial"], verdicts, subject.get("as_of"))


def read_verdict(row: Any, where: str, others: Mapping[str, Verdict]) -> Verdict:
    """Return one clause of a result file, or raise UsageError that says ``where`` it is wrong."""
    demand(isinstance(row, dict) and isinstance(row.get("seconds"), int | float), f"{where} has no 'seconds'.")
    row = NEW_TEXTS | row
    for field in (*TEXTS, *NEW_TEXTS):
        demand(isinstance(row.get(field), str), f"{where} has no text {field!r}.")
    identity, outcome = row["id"], row["outcome"]
    demand(re.fullmatch(r"[A-Z]+-[0-9]+", identity) is not None, f"{where} has {identity!r}, which is not a clause id.")
    demand(identity not in others, f"{where} has the id {identity!r} for the second time.")
    demand(
        outcome in OUTCOMES, f"{where} has the unknown outcome {outcome!r}: it must be one of {', '.join(OUTCOMES)}."
    )
    return Verdict(**{field: row[field] for field in (*TEXTS, "seconds", *NEW_TEXTS)})


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Return a JSON object of schema 1, or raise UsageError that calls the file a ``kind``."""
    found = reading.read_json(path, kind)
    schema = found.get("schema") if isinstance(found, dict) else None
    demand(schema == SCHEMA, f"the {kind} {path} has schema {schema!r}, but this version reads schema {SCHEMA}.")
    return found  # type: ignore[no-any-return] # only a dict has the schema


def demand(condition: bool, message: str) -> None:
    """Raise UsageError unless a condition holds."""
    if not condition:
        raise UsageError(message)
