"""Settings of ``python -m reference train``: from a preset, files and the command line."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from reference import files
from reference.cli.everyday import SHORT, everyday_help, spelt_out, take_help
from reference.cli.options import add_options, build, hint, new_parser, parse
from reference.cli.presets import MUON_BESIDE_ADAMW, PRESETS, find_preset
from reference.cli.starting import preset_of, run_name, start_of, value_of
from reference.cli.yamltext import LONGEST, load_yaml
from reference.config import DataConfig, GPTConfig, TrainConfig, allows, as_plain, in_words, shown
from reference.errors import ConfigurationError
from reference.finetuning.config import FinetuneConfig

GROUPS: dict[str, type] = {"model": GPTConfig, "train": TrainConfig, "data": DataConfig, "finetune": FinetuneConfig}
MUON = "torch.optim.Muon"
KEYWORDS = ("lr", "betas", "eps", "weight_decay", "momentum")  # of optimizers, for hints

EXAMPLES = """\
presets:
{presets}

examples:
  python -m reference train                                       the preset tiny, on this Python's standard library
  python -m reference train --updates 2000 --lr 1e-3 --model.n_layer 6
  python -m reference train --train.optimizer_args.eps 1e-6       one keyword of the optimizer
  python -m reference train --train.optimizer torch.optim.SGD --train.optimizer_args '{{lr: 0.1, momentum: 0.9}}'
  python -m reference train --optimizer torch.optim.Muon          AdamW trains what is no matrix of a block
  python -m reference train --preset gpt2-124m --data data/mine --devices 8 --microbatches 1
  python -m reference train --preset gpt2-124m --print_config > run.yaml
  python -m reference train --config run.yaml --directory out/run
  python -m reference train --config out/run/config.yaml --resume auto
  python -m reference train --init_from out/gpt2 --data data/mine                 fine-tune; the shape is the folder's
  python -m reference train --init_from out/gpt2 --lora_rank 8 --finetune.quantize nf4

The command line wins over files, a later file over an earlier one, and files over the preset. A mapping
(optimizer_args) in a file replaces the preset's as a whole. Write numbers as 0.0003 or 3e-4, and None as null.

exit code: 0 done, 1 failed, 2 the settings were wrong; 130, 143 or 129 stopped by Ctrl-C, SIGTERM or a terminal that
was closed, with a checkpoint
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run depends on, as it is written to ``config.yaml`` in its directory."""

    preset: str
    """the preset that gives every setting its first value"""
    model: GPTConfig
    train: TrainConfig
    data: DataConfig
    directory: str
    """the folder to write checkpoints, metrics and config.yaml to"""
    resume: bool | str = False
    """true: go on from the newest checkpoint in the directory; auto: only if there is one; a path: from that one"""
    tensorboard: bool = dataclasses.field(default=False, metadata={"flag": True})
    """also write TensorBoard's event files"""
    init_from: str | None = None
    """start from the weights of this checkpoint, or of the newest in a run's directory, with a fresh optimizer; the
    model's shape is theirs"""
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)
    wandb: str | None = None
    """also log the metrics to this project of Weights & Biases"""
    sample_prompt: str = ""
    """the text that samples continue; if it is empty, they begin a new document"""

    def plain(self) -> dict[str, Any]:
        """Return the settings as a mapping of plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {group: as_plain(values[group]) for group in GROUPS}

    def yaml(self) -> str:
        """Return the settings as a file that ``--config`` takes."""
        import yaml  # type: ignore[import-untyped] # PyYAML has no types of its own

        return str(yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True))


def read_settings(arguments: Sequence[str]) -> Settings:
    """Return the settings that preset, files and command line give.

    Raises:
        ConfigurationError: if something is unknown, of a wrong type or out of range. Names the nearest accepted one.
        SystemExit: after printing the help, if that was asked for.
    """
    words, topic = take_help(arguments)
    paths, others = take(spelt_out(words), "--config")
    contents = [read_file(Path(name)) for name in paths]
    for value in (removed := take(others, "--train.capture_step"))[0]:
        TrainConfig(capture_step=load_yaml(value, "--train.capture_step"))
    others = removed[1]
    for group in GROUPS:  # a group as a whole, by a file or as a mapping
        values, others = take(others, f"--{group}")
        if group == "data":  # a folder is short for its path
            others += [word for value in values if is_folder(value) for word in ("--data.path", value)]
            values = [value for value in values if not is_folder(value)]
        contents += [checked({group: read_mapping(value, group)}, f"--{group}") for value in values]
    named = [str(content["preset"]) for content in contents if "preset" in content] + take(others, "--preset")[0]
    ranks = [content.get("finetune", {}).get("lora_rank") for content in contents]
    rank = value_of(others, "--finetune.lora_rank") or next(filter(None, reversed(ranks)), None)
    start, adapters = start_of(contents, others), rank not in (None, "null")
    preset = named[-1] if named else "tiny"
    told = [found["train"]["optimizer"] for found in contents if "optimizer" in found.get("train", {})]
    optimizer = value_of(others, "--train.optimizer") or next(reversed(told), None)
    if optimizer == MUON and not is_given("optimizer_args", contents, others):
        contents = [{"train": muon_beside(preset_train(preset, start, adapters), start is not None)}, *contents]
    parser, known, defaults = build_parser(preset, contents, start, adapters)
    if topic is not None:
        print_help(topic, parser, defaults)
        raise SystemExit(0)
    found = parse(parser, others, known, [f"--{name}" for name in SHORT])
    if not is_given("warmup", contents, others):
        found["train"]["warmup"] = fitting_warmup(found["train"])
    if not found["directory"]:
        raise ConfigurationError(f"--directory is empty: give a folder, for example out/{found['preset']}.")
    return build(Settings, found | {group: config(**found[group]) for group, config in GROUPS.items()})


def build_parser(
    preset_name: str, contents: Sequence[dict[str, Any]], start: Path | None = None, adapters: bool = False
) -> tuple[ArgumentParser, list[str], dict[str, Any]]:
    """Return the parser, the names of its options, and their defaults: the values of a preset and of files.

    Args:
        preset_name: gives every setting its first value.
        contents: of the files.
        start: the folder of trained weights whose shape takes the place of the preset's.
        adapters: whether LoRA is trained beside them.

    Raises:
        ConfigurationError: if there is no such preset.
    """
    preset = find_preset(preset_name) if start is None else preset_of(start, adapters)
    directory = f"out/{preset_name}" if start is None else f"out/{run_name(start)}-tuned"
    values: dict[str, Any] = {"preset": preset_name, "directory": directory}
    values |= {group: as_plain(getattr(preset, group)) for group in ("model", "train", "data")}
    values["finetune"] = as_plain(FinetuneConfig())
    for content in contents:
        values |= {key: values[key] | value if key in GROUPS else value for key, value in content.items()}
    parser = new_parser("train", "Train a GPT.", examples())
    parser.add_argument("--config", metavar="FILE", help="a YAML file with settings; repeatable")
    parser.add_argument("--print_config", action="store_true", help="print the settings as such a file, and end")
    known = ["--config", "--print_config", *add_options(parser, Settings, defaults=values | {"preset": preset_name})]
    for group, config in GROUPS.items():
        known += add_options(parser, config, f"{group}.", values[group])
    return parser, [*known, *(f"--train.optimizer_args.{keyword}" for keyword in KEYWORDS)], values


def examples() -> str:
    """Return the end of the help: presets, examples and exit codes."""
    return EXAMPLES.format(presets="\n".join(f"  {name:12}{preset.about}" for name, preset in PRESETS.items()))


def print_help(topic: str, parser: ArgumentParser, values: dict[str, Any]) -> None:
    """Print the help: what everybody sets, one group of settings, or all.

    Raises:
        ConfigurationError: for an unknown topic.
    """
    if topic and topic not in ("all", *GROUPS):
        raise ConfigurationError(f"--help has no topic {shown(topic)}: choose one of all, {', '.join(GROUPS)}.")
    if topic in GROUPS:
        group = new_parser("train", f"The settings of the group {topic}. --help all shows every setting.", "")
        add_options(group, GROUPS[topic], f"{topic}.", values[topic])
        group.print_help()
    elif topic == "all":
        parser.print_help()
    else:
        print(everyday_help(GROUPS, values, examples()), end="")


def preset_train(preset_name: str, start: Path | None, adapters: bool) -> TrainConfig:
    """Return how the preset of a run trains; see :func:`build_parser`."""
    return (find_preset(preset_name) if start is None else preset_of(start, adapters)).train


def muon_beside(train: TrainConfig, tuned: bool) -> dict[str, Any]:
    """Return the optimizers' arguments for Muon: the preset's, which are AdamW's, go to the rest of the tensors.

    Muon's rate is the one of its author's implementation (https://github.com/KellerJordan/Muon). Trained weights are
    tuned at ten times AdamW's: each element of a matrix of a thousand rows then moves about as far.
    """
    decay = train.optimizer_args["weight_decay"]
    rate = MUON_BESIDE_ADAMW * train.optimizer_args["lr"] if tuned else 0.02
    return {"optimizer_args": {"lr": rate, "weight_decay": decay}, "optimizer_rest_args": dict(train.optimizer_args)}


def is_given(name: str, contents: Sequence[dict[str, Any]], words: Sequence[str]) -> bool:
    """Return whether a setting of the group ``train`` stands in a file or on the command line."""
    return value_of(words, f"--train.{name}") is not None or any(name in found.get("train", {}) for found in contents)


def fitting_warmup(train: dict[str, Any]) -> Any:
    """Return the warm-up of a preset, or, for a run of few updates, a fifth of them."""
    warmup, updates = train["warmup"], train["updates"]
    if not isinstance(updates, int) or updates < 1:  # told later
        return warmup
    return min(warmup, updates // 5)


def is_folder(value: str) -> bool:
    """Return whether the value of ``--data`` names a folder, rather than a file or a mapping of settings."""
    return not value.lstrip().startswith("{") and not Path(value).is_file()


def take(arguments: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Return all values of an option on the command line, and the other words; one without value is left in these."""
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


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a configuration file; its values are checked later, together with all others.

    Raises:
        ConfigurationError: if it is missing or not YAML, or has a key that is not a setting.
    """
    return checked(load_file(path, f"the configuration file {path}"), f"the configuration file {path}")


def load_file(path: Path, source: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigurationError: if it is missing, not a file, not UTF-8 or not YAML.
    """
    try:
        text = files.read_file(path, LONGEST).decode()
    except OSError as error:
        raise ConfigurationError(f"{source} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{source} is not UTF-8 text.") from error
    return load_yaml(text, source)


def read_mapping(value: str, group: str) -> Any:
    """Return the settings of a group, from a YAML file or from the text of a mapping."""
    there = False
    with contextlib.suppress(OSError, ValueError):  # a mapping may be too long for a name
        there = Path(value).exists()
    if there:
        return load_file(Path(value), f"the file {value}")
    return load_yaml(value, f"--{group}")


def checked(content: Any, source: str) -> dict[str, Any]:
    """Return the content of a file if all of its keys are settings.

    Raises:
        ConfigurationError: if not; it names the nearest setting.
    """
    if not isinstance(content, dict):
        raise ConfigurationError(f"{source} holds no settings: write lines like 'preset: tiny'.")
    names = [field.name for field in dataclasses.fields(Settings)]
    names += [f"{group}.{field.name}" for group, config in GROUPS.items() for field in dataclasses.fields(config)]
    for key, value in content.items():
        if key in GROUPS and not isinstance(value, dict):
            raise ConfigurationError(
                f"{key} in {source} is {shown(value)}, but must be a mapping of settings; a single one is given as "
                f"--{key}.NAME VALUE."
            )
        if key == "train" and "capture_step" in value:  # of 0.1.0
            TrainConfig(capture_step=value.pop("capture_step"))
        for name in [str(key), *(f"{key}.{inner}" for inner in value)] if key in GROUPS else [str(key)]:
            if name not in names:
                raise ConfigurationError(
                    f"{source} has the unknown name {shown(name)}: {hint(name, names, 'python -m reference train')}"
                )
    for config, values in ((Settings, content), *((GROUPS[key], content[key]) for key in GROUPS if key in content)):
        for field in dataclasses.fields(config):
            if field.name in values and field.name not in GROUPS and not allows(field.type, values[field.name]):
                kind = in_words(field.type)
                raise ConfigurationError(f"{field.name} is {shown(values[field.name])}, but must be {kind}.")
    return content
