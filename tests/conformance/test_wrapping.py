"""Text that is wrapped for a terminal."""

import io

from rich.console import Console
from rich.text import Text

from conformance.report.wrapping import print_wrapped


def wrapped(text: str, width: int, indent: int = 0, hang: int = 0) -> list[str]:
    """Return the lines of a text on a terminal of this width."""
    stream = io.StringIO()
    print_wrapped(Console(file=stream, width=width), Text(text), indent, hang)
    return stream.getvalue().splitlines()


def test_lines_are_indented_and_end_without_spaces() -> None:
    assert wrapped("one two three four", width=10, indent=2) == ["  one two", "  three", "  four"]
    assert wrapped("one two three four", width=10, hang=2) == ["one two", "  three", "  four"]


def test_lines_of_a_text_stay_lines() -> None:
    assert wrapped("one\ntwo", width=80, indent=2) == ["  one", "  two"]


def test_a_word_that_is_wider_than_the_terminal_is_not_lost() -> None:
    assert "".join(wrapped("x" * 25, width=10)) == "x" * 25
