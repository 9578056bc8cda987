"""The command line: ``python -m reference train|prepare|generate|evaluate|export|import``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from reference.cli.settings import hint, no_option
from reference.cli.train import checkpoint_folder, logged, train_command
from reference.config import ConfigurationError, DataConfig, TrainConfig

OVERVIEW = """\
usage: python -m reference COMMAND [OPTION ...]

A small GPT trainer: prepare text, train on it, and use what came out.

commands:
{commands}

examples:
  python -m reference train                                            a minute on two CPU cores
  python -m reference generate --checkpoint out/tiny --prompt 'def '
  python -m reference prepare --text 'books/**/*.txt' --tokenizer bpe:8192 --out data/books
  python -m reference train --preset gpt2-124m --data.path data/books --model.vocab_size 8192

python -m reference COMMAND --help shows the options of a command, and more examples.
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors for main() to tell in one sentence, which names the nearest option."""

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse. A misspelt option is told before the one that is missing because of it.

        Raises:
            ConfigurationError: if the words do not fit.
        """
        options = list(self._option_string_actions)
        for word in words:
            if word.startswith("--") and word.partition("=")[0] not in options:
                raise ConfigurationError(no_option([word], options))
        known, rest = self.parse_known_args(words)
        if rest:
            raise ConfigurationError(no_option(rest, options))
        return known

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError instead of printing the usage."""
        raise ConfigurationError(f"{message.removeprefix('argument ').rstrip('.')}.")


def command_parser(command: str, description: str, examples: str) -> Parser:
    """A parser with what every command has."""
    return Parser(
        f"python -m reference {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def prepare_command(arguments: Sequence[str]) -> int:
    """Text files -> token files."""
    parser = command_parser(
        "prepare",
        "Turn text files into the token files that training reads.",
        "  python -m reference prepare                                            this Python's standard library\n"
        "  python -m reference prepare --text notes.txt letters/ --out data/mine  files, and all below a folder\n"
        "  python -m reference prepare --text 'books/**/*.txt' --tokenizer bpe:8192 --out data/books\n"
        "  python -m reference prepare --text books/ --tokenizer path/to/tokenizer.json --out data/books",
    )
    default = DataConfig().path
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="PATH", help="files, folders or patterns; default: standard library"
    )
    parser.add_argument("--tokenizer", default="bytes", help="bytes (default), bpe:SIZE, or a tokenizer.json")
    parser.add_argument("--out", type=folder, metavar="DIR", help=f"data folder; default, without --text: {default}")
    parser.add_argument("--validation_share", type=float, default=0.05, metavar="SHARE", help="default: 0.05")
    parser.add_argument("--seed", type=int, default=1337, help="chooses what is for validation; default: 1337")
    parser.add_argument("--overwrite", action="store_true", help="also replace data of another tokenizer")
    options = parser.read(arguments)
    if options.out is None and options.text:
        raise ConfigurationError("--text needs --out, the folder to write to, for example --out data/mine.")
    from reference.data.prepare import prepare

    with logged():
        written = prepare(
            options.text,
            options.tokenizer,
            options.out or Path(default),
            validation_share=options.validation_share,
            seed=options.seed,
            overwrite=options.overwrite,
            progress=sys.stderr.isatty(),
        )
    print(written.describe())
    return 0


def generate_command(arguments: Sequence[str]) -> int:
    """A checkpoint and a prompt -> text, as it comes."""
    parser = command_parser(
        "generate",
        "Continue a text with a trained model.",
        "  python -m reference generate --checkpoint out/tiny --prompt 'def '\n"
        "  python -m reference generate --checkpoint out/tiny --tokens 500 --temperature 0.8 --top_p 0.95 --seed 1\n"
        "  python -m reference generate --checkpoint out/tiny/step-00000200 --prompt 'import ' --temperature 0",
    )
    add_checkpoint(parser)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="default: the beginning of a document")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="at most; default: 200")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most probable token; default: 1")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K most probable tokens only")
    parser.add_argument("--top_p", type=float, metavar="P", help="draw from those that sum to P only")
    parser.add_argument("--seed", type=int, help="default: another text each time")
    options = parser.read(arguments)
    import torch

    from reference.checkpoint.folder import load_for_inference
    from reference.data.tokenizer import load_tokenizer
    from reference.model.generation import generate

    with logged():
        checkpoint = checkpoint_folder(options.checkpoint)
        model = load_for_inference(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = load_tokenizer(checkpoint)  # behind it: damage of the checkpoint is told as such
        ids = generate(
            model,
            tokenizer.encode(options.prompt) or [tokenizer.end_of_document],
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            end=tokenizer.end_of_document,
            vocab_size=tokenizer.vocab_size,
        )
        print(options.prompt, end="", flush=True)
        for piece in tokenizer.stream(ids):
            print(piece, end="", flush=True)
        print()
    return 0


def evaluate_command(arguments: Sequence[str]) -> int:
    """A checkpoint and data -> loss."""
    parser = command_parser(
        "evaluate",
        "Measure the loss of a checkpoint over all of a split.",
        "  python -m reference evaluate --checkpoint out/tiny --data data/standard-library\n"
        "  python -m reference evaluate --checkpoint out/books --data data/books --precision bf16-mixed",
    )
    add_checkpoint(parser)
    parser.add_argument("--data", type=folder, required=True, metavar="DIR", help="folder that prepare wrote")
    parser.add_argument("--split", choices=("train", "validation"), default="validation", help="default: validation")
    parser.add_argument("--microbatch_size", type=int, default=8, metavar="B", help="sequences at a time; default: 8")
    precisions = ("32-true", "bf16-mixed")
    parser.add_argument("--precision", choices=precisions, default="32-true", help="default: 32-true")
    options = parser.read(arguments)
    from reference.training.evaluation import evaluate_checkpoint

    with logged():
        checkpoint = checkpoint_folder(options.checkpoint)
        config = TrainConfig(precision=options.precision)
        print(evaluate_checkpoint(checkpoint, options.data, options.split, options.microbatch_size, config).describe())
    return 0


def export_command(arguments: Sequence[str]) -> int:
    """A checkpoint -> a folder for transformers."""
    parser = command_parser(
        "export",
        "Write a checkpoint as a folder that from_pretrained of transformers reads.",
        "  python -m reference export --format huggingface --checkpoint out/tiny --out exported",
    )
    add_checkpoint(parser)
    add_format(parser)
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="a folder that is empty or not there")
    options = parser.read(arguments)
    from reference.interchange.huggingface import export_huggingface

    with logged():
        print(f"Written: {export_huggingface(checkpoint_folder(options.checkpoint), options.out)}")
    return 0


def import_command(arguments: Sequence[str]) -> int:
    """A folder of transformers -> a checkpoint."""
    parser = command_parser(
        "import",
        "Make a checkpoint from a folder that save_pretrained of transformers wrote (GPT-2 or Llama).",
        "  python -m reference import --format huggingface --from path/to/gpt2 --out out/gpt2\n"
        "  python -m reference generate --checkpoint out/gpt2 --prompt 'Hello'",
    )
    add_format(parser)
    parser.add_argument("--from", type=folder, required=True, metavar="DIR", dest="source", help="has config.json")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="gets step-00000000")
    options = parser.read(arguments)
    from reference.interchange.huggingface import import_huggingface

    with logged():
        print(f"Written: {import_huggingface(options.source, options.out)}")
    return 0


def folder(name: str) -> Path:
    """A folder that an option names: not the current one for an empty name, such as a variable that is not set."""
    if not name:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(name)


def add_checkpoint(parser: Parser) -> None:
    """The option ``--checkpoint``."""
    parser.add_argument(
        "--checkpoint", type=folder, required=True, metavar="DIR", help="a checkpoint; or a run's directory: its newest"
    )


def add_format(parser: Parser) -> None:
    """The option ``--format``."""
    parser.add_argument("--format", choices=("huggingface",), default="huggingface", help="default: huggingface")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "prepare": (prepare_command, "turn text files into token files"),
    "train": (train_command, "train a GPT: presets, configuration files, any setting by name"),
    "generate": (generate_command, "continue a text with a trained model"),
    "evaluate": (evaluate_command, "loss, perplexity and bits per byte of a checkpoint"),
    "export": (export_command, "write a checkpoint for Hugging Face transformers"),
    "import": (import_command, "make a checkpoint from a model of transformers"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

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
        print(f"error: {where}{error.strerror or error}.", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code


def run(words: list[str]) -> int:
    """Run the command that the words say; the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items())))
        return 0 if words else 2
    if words[0] not in COMMANDS:
        raise ConfigurationError(f"there is no command {words[0]!r}, {hint(words[0], list(COMMANDS))}")
    return COMMANDS[words[0]][0](words[1:])


def discard_output() -> None:
    """Write nothing more to stdout: Python would try once again as it exits, and complain."""
    with contextlib.suppress(OSError):  # it is no file, but something of the caller's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code(error: Exception) -> int | None:
    """2 for a setting that cannot work, 1 for another error of ours, None for one that is a fault of the program."""
    if isinstance(error, ConfigurationError):
        return 2
    from reference.checkpoint.folder import CheckpointError  # these import torch
    from reference.data.tokenfile import DataError
    from reference.training.update import TrainingError

    return 1 if isinstance(error, CheckpointError | DataError | TrainingError) else None


if __name__ == "__main__":
    sys.exit(main())
