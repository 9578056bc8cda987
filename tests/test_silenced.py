"""Wherever the linter or the type checker is silenced, the reason stands beside it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("conformance", "reference", "tests", "examples", "docs")
STRANGERS = ROOT / "tests" / "audits" / "scripts"  # written as others write
SILENCED = re.compile(r"#\s*(?:type:\s*ignore|noqa|pragma)[^#]*(?P<reason>#\s*\S.*)?$")


def unexplained(text: str) -> list[str]:
    """Lines that silence a check without a reason behind it."""
    found = ((line, SILENCED.search(line)) for line in text.splitlines())
    return [line.strip() for line, silenced in found if silenced and not silenced["reason"]]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_silenced_check_has_its_reason(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not path.is_relative_to(STRANGERS) and path != Path(__file__):
            assert not unexplained(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("line", ["x = 1  # noqa: E501", "x = y  # type: ignore[misc]", "x = y  # type: ignore"])
def test_one_without_is_found(line: str) -> None:
    assert unexplained(line) == [line]
    assert not unexplained(f"{line} # because of issue 7")
