"""Text on a terminal: wrapped, indented, and without spaces at the ends of lines."""

from rich.console import Console
from rich.text import Text


def print_wrapped(console: Console, text: Text, indent: int = 0, hang: int = 0) -> None:
    """Print a text in as many lines as the width of the console takes.

    Args:
        console: to print to.
        text: what to print. Rich keeps the space at which it breaks a line, and a log or an editor would show it.
        indent: columns before each line.
        hang: columns more before each line but the first.
    """
    for number, line in enumerate(text.wrap(console, console.width - indent - hang)):
        line.rstrip()
        console.print(Text(" " * (indent + (hang if number else 0))).append_text(line), soft_wrap=True)
