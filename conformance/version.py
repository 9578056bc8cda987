"""The suite's own version, and which of two versions is newer."""

import importlib.metadata
import tomllib
from pathlib import Path

DISTRIBUTION = "gpt-conformance"


def suite_version() -> str:
    """Return the version of this package, also where it runs from a checkout that was not installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        return f"{tomllib.loads(text)['project']['version']}, from a checkout"
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return "not installed"


def is_newer(since: str, as_of: str | None) -> bool:
    """Return True if ``since`` ("0.2") is a later version than ``as_of``; without ``as_of`` nothing is too new."""
    return as_of is not None and as_numbers(since) > as_numbers(as_of)


def as_numbers(version: str) -> tuple[int, ...]:
    """Return "0.2" as (0, 2)."""
    return tuple(int(part) for part in version.split("."))
