"""What a user may ask for, at either door."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Format = Literal["text", "json", "github"]
PASSED, FAILED, USAGE = 0, 1, 2
"""Exit codes: no clause failed; some did; the command line was wrong."""

OPTIONS: dict[str, dict[str, Any]] = {
    "--subject": {
        "metavar": "NAME",
        "default": "reference",
        "help": "the stack to judge: reference, litgpt, ..., or module:Attribute of an adapter (default: reference)",
    },
    "--clause": {
        "metavar": "ID",
        "action": "append",
        "default": [],
        "help": "judge only this clause or chapter; may be repeated",
    },
    "--deviations": {
        "metavar": "FILE",
        "help": "TOML file of the clauses that the stack breaks knowingly, with reasons",
    },
    "--report": {"metavar": "FILE", "help": "write the results as JSON"},
}
"""Options of both doors, as argparse and pytest take them."""
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Options:
    """What a user asked for."""

    subject: str = "reference"
    clauses: tuple[str, ...] = ()
    deviations: Path | None = None
    report: Path | None = None

    @classmethod
    def of(cls, given: Any) -> "Options":
        """Return the options in a namespace that argparse or pytest has filled from ``OPTIONS``."""
        files = (Path(name) if name else None for name in (given.deviations, given.report))
        return cls(given.subject, tuple(given.clause), *files)
