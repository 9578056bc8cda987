"""The command line: ``python -m reference train|prepare|generate|evaluate|export|import``."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from reference.errors import ConfigurationError, ExplainedError

OVERVIEW = """\
usage: python -m reference COMMAND [OPTION ...]

A small GPT trainer: prepare text, train on it, and use what came out.

commands:
{commands}

examples:
  python -m reference train                                            a minute on two CPU cores
  python -m reference generate --checkpoint out/tiny --prompt 'def '
  python -m reference prepare --text 'books/**/*.txt' --tokenizer bpe:8192 --out data/books
  python -m reference train --preset gpt2-124m --data data/books --vocab_size 8192

python -m reference COMMAND --help shows the options of a command, and more examples.
"""
LONGEST = 380  # characters of a message


def command(name: str, module: str = "reference.cli.commands") -> Callable[[Sequence[str]], int]:
    """Return a command, imported when it is called: Ctrl-C is heard by then."""

    def call(words: Sequence[str]) -> int:
        return int(getattr(importlib.import_module(module), f"{name}_command")(words))

    return call


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "prepare": (command("prepare"), "turn text files or records into token files"),
    "train": (
        command("train", "reference.cli.train"),
        "train a GPT: presets, configuration files, any setting by name",
    ),
    "generate": (command("generate"), "continue a text with a trained model"),
    "evaluate": (command("evaluate"), "loss, perplexity and bits per byte of a checkpoint"),
    "export": (command("export"), "write a checkpoint for Hugging Face transformers"),
    "import": (command("import"), "make a checkpoint from a model of transformers"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    What goes wrong for a reason that a user can mend is one sentence on stderr: 2 for settings, 1 for the rest.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return run(words)
        finally:
            print(end="", flush=True)  # here, so that a pipe that is closed or a disk that is full is told here too
    except BrokenPipeError:  # the reader (head, say) has seen enough
        discard_output()
        return 1
    except KeyboardInterrupt:
        print("Stopped at once.", file=sys.stderr)
        return 130
    except UnicodeEncodeError as error:
        print(f"This terminal cannot show {error.object[error.start]!a}: set PYTHONIOENCODING=utf-8.", file=sys.stderr)
        return 1
    except OSError as error:  # what no other message tells: a disk that is full, a file that may not be read
        discard_output()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {readable(f'{where}{error.strerror or error}.')}", file=sys.stderr)
        return 1
    except ExplainedError as error:
        print(f"error: {readable(str(error))}", file=sys.stderr)
        return error.exit_code


def run(words: list[str]) -> int:
    """Run the command that the words name and return the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items())))
        return 0 if words else 2
    if words[0] not in COMMANDS:
        from reference.cli.options import hint

        raise ConfigurationError(f"there is no command {words[0]!r}: {hint(words[0], list(COMMANDS))}")
    return COMMANDS[words[0]][0](words[1:])


def readable(message: str) -> str:
    """Return a message as one line of at most ``LONGEST`` characters that do nothing to a terminal.

    What is too long, such as the name of a file, is cut in the middle: the end says what to do.
    """
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}"


def discard_output() -> None:
    """Write nothing more to stdout: Python would try once again as it exits, and complain."""
    with contextlib.suppress(OSError):  # it is not a file, but something of the caller's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
