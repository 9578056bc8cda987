"""Settings of ``python -m reference train``: from a preset, files and the command line; a mistake is one sentence."""

import dataclasses
import difflib
import re
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from reference.cli.presets import PRESETS, find_preset
from reference.config import ConfigurationError, DataConfig, GPTConfig, TrainConfig, as_plain

GROUPS: dict[str, type] = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig}
KEYWORDS = ("lr", "betas", "eps", "weight_decay", "momentum")  # of optimizers, for hints

EXAMPLES = """\
presets:
{presets}

examples:
  python -m reference train                                       the preset tiny, on this Python's standard library
  python -m reference train --train.updates 2000 --model.n_layer 6
  python -m reference train --train.optimizer_args.lr 1e-3        one keyword of the optimizer
  python -m reference train --train.optimizer torch.optim.SGD --train.optimizer_args '{{lr: 0.1, momentum: 0.9}}'
  python -m reference train --preset gpt2-124m --data.path data/mine --train.devices 8 --train.microbatches 1
  python -m reference train --preset gpt2-124m --print_config > run.yaml
  python -m reference train --config run.yaml --directory out/run
  python -m reference train --config out/run/config.yaml --resume auto

The command line wins over files, a later file over an earlier one, and files over the preset. A mapping
(optimizer_args) in a file replaces the preset's as a whole. Numbers may be written as 3e-4, nothing as null.

exit code: 0 done, 1 failed, 2 the settings were wrong, 130 or 143 stopped by Ctrl-C or SIGTERM, with a checkpoint
"""


@dataclass(frozen=True)
class Settings:
    """All that a run depends on, as it is written to ``config.yaml`` in its directory."""

    preset: str
    model: GPTConfig
    train: TrainConfig
    data: DataConfig
    directory: str
    resume: bool | str
    tensorboard: bool

    def plain(self) -> dict[str, Any]:
        """As a mapping of plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {group: as_plain(values[group]) for group in GROUPS}

    def yaml(self) -> str:
        """As a file that ``--config`` takes."""
        import yaml  # type: ignore[import-untyped] # PyYAML has no types of its own

        return str(yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True))


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from command line, files and preset.

    Raises:
        ConfigurationError: if something is unknown, of a wrong type or out of range. Names the nearest accepted one.
        SystemExit: after printing the help, if that was asked for.
    """
    names, others = take(arguments, "--config")
    files = [read_file(Path(name)) for name in names]
    chosen = [file["preset"] for file in files if "preset" in file] + take(arguments, "--preset")[0]
    name = str(chosen[-1]) if chosen else "tiny"
    parser = build_parser(name)
    try:
        # jsonargparse goes from left to right: with the files first, the command line wins wherever they stand.
        found = parser.parse_args([*(f"--config={name}" for name in names), *others])
    except ArgumentError as error:
        raise ConfigurationError(sentence(str(error), options_of(parser))) from error
    if not found.directory:
        raise ConfigurationError(f"--directory is empty: give a folder, for example out/{name}.")
    groups: dict[str, Any] = {group: config(**found[group].as_dict()) for group, config in GROUPS.items()}
    return Settings(
        preset=name, directory=found.directory, resume=found.resume, tensorboard=found.tensorboard, **groups
    )


def build_parser(preset_name: str) -> ArgumentParser:
    """The parser, with the values of a preset as its defaults.

    Raises:
        ConfigurationError: if there is no such preset.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help is what stands under each field
    preset = find_preset(preset_name)
    presets = "\n".join(f"  {name:12}{preset.about}" for name, preset in PRESETS.items())
    parser = ArgumentParser(
        "python -m reference train",
        usage="python -m reference train [--preset NAME] [--config FILE] [--GROUP.FIELD VALUE ...]",
        description="Train a GPT.",
        epilog=EXAMPLES.format(presets=presets),
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--preset", default=preset_name, metavar="NAME", help="where all settings start from")
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with settings; repeatable")
    directory = f"out/{preset_name}"
    parser.add_argument("--directory", default=directory, help="for checkpoints, metrics and config.yaml")
    parser.add_argument(
        "--resume",
        type=bool | str,
        default=False,
        metavar="false|true|auto|PATH",
        help="from the newest checkpoint in the directory (auto: if there is one), or from the one at PATH",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard's event files too")
    for group, config in GROUPS.items():
        parser.add_class_arguments(config, group)
        parser.set_defaults({group: as_plain(getattr(preset, group))})
    return parser


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help texts with the lines of the examples as they are, and without the markup of docstrings."""

    def format_help(self) -> str:
        """The whole text."""
        return super().format_help().replace("``", "")


def options_of(parser: ArgumentParser) -> list[str]:
    """All options that a parser accepts, and the usual keywords of optimizers."""
    options = re.findall(r"^ +(?:-\w, )?(--[\w.]+)", parser.format_help(), flags=re.MULTILINE)
    return [*options, *(f"--train.optimizer_args.{keyword}" for keyword in KEYWORDS)]


def take(arguments: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """All values of an option on the command line, and the other words; an option without value is left in these."""
    values, others = [], []
    words = iter(arguments)
    for word in words:
        if word.startswith(f"{option}="):
            values.append(word.removeprefix(f"{option}="))
        elif word == option and (value := next(words, None)) is not None:
            values.append(value)
        else:
            others.append(word)
    return values, others


def read_file(path: Path) -> Mapping[str, Any]:
    """The keys of a configuration file; its values are checked later, together with all others.

    Raises:
        ConfigurationError: if it is missing or no YAML, or has a key that is no setting.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"the configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not UTF-8 text"
        raise ConfigurationError(f"the configuration file {path} is no valid YAML{where}: {problem}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"the configuration file {path} holds no settings: write lines like 'preset: tiny'.")
    names = [field.name for field in dataclasses.fields(Settings)]
    names += [f"{group}.{field.name}" for group, config in GROUPS.items() for field in dataclasses.fields(config)]
    for key, value in content.items():
        inner = [f"{key}.{name}" for name in value] if key in GROUPS and isinstance(value, dict) else []
        for name in [str(key), *inner]:
            if name not in names:
                raise ConfigurationError(f"the configuration file {path} has {name!r}, {hint(name, names)}")
    return content


def sentence(message: str, options: Iterable[str]) -> str:
    """What jsonargparse says, often over several lines, as one sentence with the nearest accepted option."""
    # Releases differ: 4.41 has "Unrecognized", and does not tell every wrong value; 4.53 has "unrecognized", and does.
    if unknown := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        return no_option(unknown[1].split(), list(options))
    if wrong := re.match(r'(?s)Parser key "(.*?)":(.*)', message):
        key = wrong[1]
        if key in GROUPS:
            return f"--{key} takes a YAML file or a mapping of settings; a single one is given as --{key}.NAME VALUE."
        value = re.search(r"(?:Got value|Given value): (.*)", wrong[2])
        seen = f"is {value[1]!r}, but " if value else ""
        if expected := expectation(key):
            return f"{key} {seen}must be {expected}."
    return " ".join(message.split()).removeprefix("argument ").rstrip(".") + "."


def no_option(words: Sequence[str], options: Sequence[str]) -> str:
    """The sentence about words that no option takes."""
    name = next((word for word in words if word.startswith("-")), "").partition("=")[0]
    if not name:
        return f"{words[0]!r} belongs to no option: write --NAME VALUE, with quotes around a value that has spaces."
    return f"there is no option {name!r}, {hint(name, options)}"


def expectation(key: str) -> str | None:
    """What a setting may be, in words; None for one that is none of ours."""
    group, _, name = key.partition(".")
    hints = {field.name: field.type for field in dataclasses.fields(GROUPS[group])} if group in GROUPS else {}
    return in_words(hints[name]) if name in hints else None


def in_words(annotation: Any) -> str:
    """A type as one says it."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if type(None) in get_args(annotation):
        return " or ".join([in_words(kind) for kind in get_args(annotation) if kind is not type(None)] + ["null"])
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(annotation, "a mapping, for example {lr: 3e-4}")


def hint(name: str, accepted: Sequence[str]) -> str:
    """The accepted name nearest to this one; by its last part if need be, so that --updates finds --train.updates."""
    last = re.split(r"[.-]", name)[-1]
    same = [other for other in accepted if re.split(r"[.-]", other)[-1] == last]
    ends = {re.split(r"[.-]", other)[-1]: other for other in accepted}
    near = difflib.get_close_matches(name, accepted, n=1) or [
        ends[end] for end in difflib.get_close_matches(last, ends, n=1)
    ]
    found = difflib.get_close_matches(name, same, n=1, cutoff=0.0) or near
    return f"did you mean {found[0]}?" if found else "see python -m reference train --help."
