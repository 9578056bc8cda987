"""The deviations file: which clauses a stack breaks knowingly, and why.

[OPT-11]
reason = "the class's own error message is passed on"
link = "https://github.com/..."
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from conformance.errors import UsageError
from conformance.reading import read_text

MOST = 1 << 16  # bytes: a clause has a line or two
# tomllib takes the square of its length for a key of many parts: 20 s for 30,000 of them.
LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){32}""")


def load_deviations(path: Path, known: Iterable[str]) -> dict[str, str]:
    """Return reasons by clause id.

    Raises:
        UsageError: if the file cannot be read, names a clause that does not exist, or gives no reason.
    """
    text = read_text(path, "deviations file", MOST)
    if LONG_KEY.search(text):
        raise UsageError(f"the deviations file {path} cannot be read: it is nested too deeply.")
    try:
        entries = tomllib.loads(text)
    except ValueError as error:
        raise UsageError(f"the deviations file {path} is not TOML: {error}.") from error
    except RecursionError as error:
        raise UsageError(f"the deviations file {path} cannot be read: it is nested too deeply.") from error
    known = set(known)
    deviations = {}
    for identity, entry in entries.items():
        if identity not in known:
            raise UsageError(f"the deviations file {path} names {identity!r}, which is not a clause: correct it.")
        reason = entry.get("reason") if isinstance(entry, dict) else None
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f'the deviations file {path} gives no reason for {identity}: add reason = "...".')
        unknown = set(entry) - {"reason", "link"}
        if unknown:
            raise UsageError(
                f"the deviations file {path} has {', '.join(sorted(unknown))} for {identity}: use only reason and link."
            )
        deviations[identity] = f"{reason} ({entry['link']})" if "link" in entry else reason
    return deviations
