"""Options of a command from a dataclass: one for each field, with the docstring under the field as its help."""

import contextlib
import difflib
import functools
import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import docstring_parser
import yaml  # type: ignore[import-untyped] # PyYAML has no types of its own
from jsonargparse import ArgumentParser, get_loader

from reference.cli.yamltext import require_bounded
from reference.config import allows, check_types, in_words, shown
from reference.errors import ConfigurationError, first_line

Options = TypeVar("Options")


def new_parser(command: str, description: str, examples: str) -> ArgumentParser:
    """Return a parser for a command, whose help ends with the examples as they stand."""
    return ArgumentParser(
        f"python -m reference {command}",
        usage=f"python -m reference {command} [--OPTION VALUE ...]",
        description=description,
        epilog=examples,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,  # type: ignore[arg-type] # one of jsonargparse's is not needed
    )


def add_options(
    parser: ArgumentParser, options: type, prefix: str = "", defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Add an option for each field of a dataclass, and return their names.

    A field that is a dataclass itself is left out. Metadata of a field: ``option`` is its name on the command line,
    ``flag`` means that the option takes no value.

    Args:
        parser: gets the options.
        options: the dataclass.
        prefix: before the names, such as ``train.``.
        defaults: in place of those of the dataclass.
    """
    title, about = described(options)
    target = parser.add_argument_group(title.rstrip(".")) if prefix else parser
    names = []
    for entry in fields(options):
        if is_dataclass(entry.type):
            continue
        names.append(name := f"--{prefix}{entry.metadata.get('option', entry.name)}")
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        default = (defaults or {}).get(entry.name, default)
        if entry.metadata.get("flag"):
            target.add_argument(name, action="store_true", default=default, help=about[entry.name])
            continue
        told = "required" if default is MISSING else f"default: {json.dumps(default, default=str)}"
        text = f"{about[entry.name]} ({in_words(entry.type)}; {told})".replace("%", "%%")
        kind = {"nargs": "+"} if get_origin(entry.type) is list else {"type": value_type(entry.type)}
        default = None if default is MISSING else default
        target.add_argument(name, **kind, default=default, metavar="VALUE", help=text)
    return names


@functools.cache  # it reads and parses the source of the class
def described(options: type) -> tuple[str, dict[str, str]]:
    """Return the first line of a dataclass's docstring, and what that under each field says, each as one line."""
    found = docstring_parser.parse_from_object(options)
    lines = {entry.arg_name: " ".join((entry.description or "").split()).replace("``", "") for entry in found.params}
    return found.short_description or "", lines


def value_type(annotation: Any) -> Any:
    """Return as what jsonargparse reads the value of a field: text, or any YAML, which :func:`check_types` checks."""
    kinds = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    if get_origin(annotation) is Mapping:
        return Union[dict[str, Any], Any]  # noqa: UP007 # dict also takes --train.optimizer_args.lr
    if str in kinds and bool in kinds:
        return annotation
    return str if get_origin(annotation) is Literal or str in kinds or Path in kinds else Any


def read(command: str, options: type[Options], examples: str, words: Sequence[str]) -> Options:
    """Return the options that the words of a command line give.

    Args:
        command: its name.
        options: a dataclass; its docstring says what the command does.
        examples: for the end of the help.
        words: of the command line.

    Raises:
        ConfigurationError: if an option is unknown or missing, or its value cannot be.
        SystemExit: after printing the help, if that was asked for.
    """
    parser = new_parser(command, (options.__doc__ or "").strip(), f"examples:\n{examples}")
    known = add_options(parser, options)
    return build(options, parse(parser, words, known))


def build(options: type[Options], values: Mapping[str, Any]) -> Options:
    """Return a dataclass of these values, with paths for text where it has paths.

    Raises:
        ConfigurationError: if a value cannot be.
    """
    given: dict[str, Any] = {}
    for entry in fields(options):  # type: ignore[arg-type] # a dataclass
        option = entry.metadata.get("option", entry.name)
        value = values[option]
        if value is None and entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigurationError(f"--{option} must be given: see --help.")
        if isinstance(value, str) and allows(entry.type, Path()):
            if not value:  # such as a variable of the shell that is not set: not the current folder
                raise ConfigurationError(f"--{option}: the name is empty.")
            value = Path(value)
        given[entry.name] = value
    made = options(**given)
    check_types(made)
    return made


def parse(
    parser: ArgumentParser, words: Sequence[str], known: Sequence[str], hints: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the values that the words of a command line give.

    Args:
        parser: of the command.
        words: of the command line.
        known: names of options.
        hints: further names that a hint may give: short ones.

    Raises:
        ConfigurationError: if the words do not fit.
        SystemExit: after printing the help, if that was asked for.
    """
    words = [with_underscores(word) for word in words]
    for name in [word.partition("=")[0] for word in words if word.startswith("--")]:
        if name not in ("--help", *known) and name.rpartition(".")[0] not in known:
            raise ConfigurationError(f"there is no option {shown(name)}: {hint(name, [*hints, *known], parser.prog)}")
    for option, value in zip(["", *words], words):
        with contextlib.suppress(yaml.YAMLError):  # text, which needs no quotes
            require_bounded(value.partition("=")[2] if value.startswith("--") else value, option or value[:50])
    try:
        return dict(parser.parse_args(words).as_dict())
    except Exception as error:  # the library's own, and whatever YAML's constructors raise
        told = next(unreadable(words), " ".join(str(error).split()).rstrip("."))
        raise ConfigurationError(f"{told}.") from error


def unreadable(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the values of a command line that are YAML, but of which nothing can be made."""
    for option, value in zip(["", *words], words):
        name, text = (value.partition("=")[::2]) if value.startswith("--") else (option, value)
        try:
            get_loader("yaml")(text)
        except yaml.YAMLError:
            continue
        except Exception as error:
            yield f"{name} is {shown(text)}, which cannot be read ({first_line(error)[:100].rstrip('.')})"


def with_underscores(word: str) -> str:
    """Return a word of a command line with ``--like_this`` for ``--like-this``; values stay as they are."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") and name != "--" else word


USUAL = {
    **dict.fromkeys(("out", "output", "out_dir", "output_dir"), "--directory"),
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "--lr"),
    **dict.fromkeys(("max_steps", "max_iters", "num_steps", "train_steps"), "--updates"),
    **dict.fromkeys(("warmup_steps", "warmup_iters", "num_warmup_steps"), "--warmup"),
    **dict.fromkeys(("batch_size", "micro_batch_size", "per_device_train_batch_size"), "--microbatch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "accumulate"), "--microbatches"),
    **dict.fromkeys(("seq_len", "sequence_length", "max_seq_len", "context_length"), "--block_size"),
    **dict.fromkeys(("eval_interval", "eval_steps", "eval_every"), "--evaluate_every"),
    **dict.fromkeys(("save_steps", "save_interval", "checkpoint_every"), "--save_every"),
}
"""What other trainers call an option, and its name here."""


def hint(name: str, accepted: Sequence[str], program: str = "python -m reference") -> str:
    """Return which accepted name is nearest; by its last part if need be, so --updates finds --train.updates."""

    def last(option: str) -> str:
        return option.replace("-", ".").rpartition(".")[2]

    if last(name) in USUAL and USUAL[last(name)] in accepted:
        return f"did you mean {USUAL[last(name)]}?"
    same = [option for option in accepted if last(option) == last(name)]
    ends = {last(option): option for option in accepted}
    found = (
        difflib.get_close_matches(name, same, n=1, cutoff=0.0)
        or difflib.get_close_matches(name, accepted, n=1, cutoff=0.7)
        or [ends[end] for end in difflib.get_close_matches(last(name), ends, n=1)]
    )
    return f"did you mean {found[0]}?" if found else f"see {program} --help."
