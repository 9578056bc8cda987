"""Where a run starts: afresh, from its own checkpoint (``--resume``), or from trained weights (``--init_from``)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reference.cli.presets import Preset, fine_tuning
from reference.config import DataConfig, GPTConfig, shown
from reference.errors import CheckpointError, ConfigurationError, first_line
from reference.files import read_json

STEP = "step-"
SHAPE = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "norm", "position", "mlp", "bias")


def start_of(contents: Sequence[dict[str, Any]], words: Sequence[str]) -> Path | None:
    """Return the folder whose shape a run takes; None where it has one already.

    Args:
        contents: of configuration files. One with a model needs no other shape: it is that of a run that has begun.
        words: of the command line, as pairs ``--init_from``, folder, or joined by ``=``.

    Raises:
        ConfigurationError: if a preset is named beside it, which has a shape of its own, or the name is empty.
    """
    named = value_of(words, "--init_from")
    if named is not None and value_of(words, "--preset") is not None:
        raise ConfigurationError(
            "--preset gives a model's shape, and --init_from takes it from a folder: leave one out."
        )
    for option, given in (("--init_from", named), ("--resume", value_of(words, "--resume"))):
        if given == "":  # such as a variable of the shell that is not set
            raise ConfigurationError(f"{option}: the name is empty.")
        if given is not None and "\0" in given:
            raise ConfigurationError(f"{option} is {shown(given)}, but must not hold a NUL character.")
    complete = any("model" in content for content in contents)
    filed = next((content["init_from"] for content in contents if content.get("init_from")), None)
    start = named if named is not None else None if complete else filed
    return None if start in (None, "null", "") else Path(str(start))


def value_of(words: Sequence[str], option: str) -> str | None:
    """Return the last value of an option on a command line; None if it is not there."""
    option, found = option.replace("-", "_"), None
    for word, following in zip(words, [*words[1:], None]):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == option:
            found = value if equals else following
    return found


def run_name(start: Path) -> str:
    """Return the name of the run that a checkpoint, or a run's directory, belongs to."""
    folder = start.resolve()
    return folder.parent.name if folder.name.startswith(STEP) else folder.name


def preset_of(start: Path, adapters: bool) -> Preset:
    """Return the settings of a run that starts from the weights in a folder: their shape, gentle rates, fitting data.

    Args:
        start: a checkpoint, or the directory of a run.
        adapters: LoRA is trained, at ten times the rate of whole weights.

    Raises:
        CheckpointError: if there is no checkpoint of a reference.GPT.
    """
    from reference.checkpoint import load_config

    require_ours(start)
    folder = checkpoint_folder(start)
    config = load_config(folder)
    if "model" not in config:
        raise CheckpointError(f"{folder} holds a module that is not reference.GPT: start from it with the library.")
    try:
        model = GPTConfig(**config["model"])
    except (ConfigurationError, TypeError) as error:
        problem = first_line(error).rstrip(".")
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {problem}.") from error
    data = DataConfig().path
    if config["tokenizer"] not in (None, "bytes"):  # text has other ids with another tokenizer
        data = f"{data}-{run_name(start)}"
    preset = fine_tuning(model, data)
    if adapters:
        rate = {"lr": 10 * preset.train.optimizer_args["lr"]}
        preset = replace(preset, train=replace(preset.train, optimizer_args={**preset.train.optimizer_args, **rate}))
    return preset


def require_ours(start: Path) -> None:
    """Raise ConfigurationError for a folder of transformers, which must be imported first."""
    try:
        theirs = "model_type" in read_json(start / "config.json")
    except (OSError, ValueError):
        return
    if theirs:
        raise ConfigurationError(
            f"{start} is a folder of transformers: make a checkpoint of it with 'python -m reference import --from "
            f"{start} --out out/imported', and start from out/imported."
        )


def require_shape(folder: Path, model: GPTConfig) -> None:
    """Raise ConfigurationError if the checkpoint that a run is to go on from is of a model of another shape."""
    from reference.checkpoint import load_config

    saved = load_config(folder).get("model") or {}
    for name in SHAPE:
        if name in saved and saved[name] != getattr(model, name):
            raise ConfigurationError(
                f"{name} is {getattr(model, name)!r}, but {folder} was trained with {saved[name]!r}: to start from its "
                f"weights, give --init_from {folder} in place of --resume; to go on with its run, give its config.yaml "
                "with --config."
            )


def tokenizer_of(start: Path) -> str:
    """Return as what ``prepare`` takes it the tokenizer of a checkpoint: ``bytes``, or its folder."""
    from reference.checkpoint import load_config

    folder = checkpoint_folder(start)
    return "bytes" if load_config(folder)["tokenizer"] in (None, "bytes") else str(folder)


def checkpoint_to_resume(resume: bool | str, directory: Path) -> Path | None:
    """Return the checkpoint that a run goes on from, None for a fresh start.

    Raises:
        CheckpointError: if it is missing.
        ConfigurationError: if a fresh start would mix its checkpoints with those of an earlier run.
    """
    from reference.checkpoint import checkpoints, find

    if isinstance(resume, str) and resume != "auto":
        return checkpoint_folder(Path(resume))
    if resume is False and (there := checkpoints(directory)):
        raise ConfigurationError(
            f"{directory} holds checkpoints of an earlier run, up to {there[-1].name}: go on with it (--resume auto), "
            "choose another --directory, or delete it."
        )
    return find(True if resume is True else "auto", directory)


def checkpoint_folder(path: Path) -> Path:
    """Return the checkpoint at ``path``: that folder itself, or the newest one in a run's directory.

    Raises:
        CheckpointError: if it is neither.
    """
    from reference.checkpoint import find
    from reference.checkpoint.folder import FILES, lacking

    absent = lacking(path)
    if not absent:
        return path
    found = find("auto", path)
    if found is None and any(name not in absent for name in FILES):
        raise CheckpointError(
            f"{path} is not a whole checkpoint, because it lacks {', '.join(absent)}: copy it again, or give another."
        )
    if found is None:
        raise CheckpointError(
            f"{path} is not a checkpoint and holds none: give a folder like out/tiny, or out/tiny/step-00000100."
        )
    return found
