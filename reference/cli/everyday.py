"""The settings of ``train`` that everybody sets: their short names, and the help that shows them first."""

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reference.cli.options import described, with_underscores

SHORT = {
    "updates": "train.updates",
    "lr": "train.optimizer_args.lr",
    "weight_decay": "train.optimizer_args.weight_decay",
    "optimizer": "train.optimizer",
    "warmup": "train.warmup",
    "microbatch_size": "data.microbatch_size",
    "microbatches": "train.microbatches",
    "block_size": "model.block_size",
    "vocab_size": "model.vocab_size",
    "precision": "train.precision",
    "compile": "train.compile",
    "devices": "train.devices",
    "seed": "train.seed",
    "evaluate_every": "train.evaluate_every",
    "save_every": "train.save_every",
    "sample_every": "train.sample_every",
    "lora_rank": "finetune.lora_rank",
}
"""Short names of settings, as ``--NAME``. ``--data FOLDER`` is short for ``--data.path FOLDER``, too."""
KEYWORDS = {"lr": "Peak learning rate.", "weight_decay": "Weight decay of the tensors that decay."}


def spelt_out(words: Iterable[str]) -> list[str]:
    """Return the words of a command line with full names in place of short ones."""
    found = []
    for word in words:
        name, equals, value = with_underscores(word).partition("=")
        full = SHORT.get(name[2:]) if name.startswith("--") else None
        found.append(word if full is None else f"--{full}{equals}{value}")
    return found


def take_help(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Return a command line without ``--help [TOPIC]``, and the topic: "" if none is named, None without ``--help``."""
    for place, word in enumerate(words):
        if word in ("--help", "-h"):
            topic = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("-") else ""
            return [*words[:place], *words[place + 1 + bool(topic) :]], topic
    return list(words), None


def first_sentence(text: str) -> str:
    """Return the first sentence of a text; "e.g. a" does not end one."""
    return re.split(r"\.\s(?=[A-Z])|:\s|;\s", text)[0]


def everyday_help(groups: Mapping[str, type], values: Mapping[str, Any], epilog: str) -> str:
    """Return the help with the settings that everybody sets, by their short names.

    Args:
        groups: the dataclass of each group of settings.
        values: of the run as it would be: a mapping for each group, and others by name.
        epilog: the end of the help.
    """
    parser = ArgumentParser(
        "python -m reference train",
        usage="python -m reference train [--OPTION VALUE ...]",
        description="Train a GPT. --help all shows every setting; --help model, train, data or finetune, one group.",
        epilog=epilog,
        add_help=False,
        formatter_class=RawDescriptionHelpFormatter,
    )
    starts = {
        "--preset NAME": f"the named run that gives every setting its first value (default: {values['preset']})",
        "--config FILE": "a YAML file with settings; repeatable",
        "--data FOLDER": f"the folder that prepare wrote (default: {values['data']['path']})",
        "--directory FOLDER": f"the folder to write to (default: {values['directory']})",
        "--resume auto": "go on from the newest checkpoint in that folder, if there is one",
        "--init_from FOLDER": "start from the weights of a checkpoint or an import, to fine-tune them",
        "--tensorboard": "also write TensorBoard's event files",
        "--wandb PROJECT": "also log to this project of Weights & Biases",
        "--print_config": "print all settings as a file for --config, and end",
    }
    for words, text in starts.items():
        name, _, metavar = words.partition(" ")
        kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
        parser.add_argument(name, help=text.replace("%", "%%"), **kind)
    for short, full in SHORT.items():
        group, _, field = full.partition(".")
        if short in KEYWORDS:
            about, default = KEYWORDS[short], values["train"]["optimizer_args"].get(short)
        else:
            about, default = first_sentence(described(groups[group])[1][field]), values[group][field]
        text = f"{about.rstrip('.')} (default: {json.dumps(default, default=str)})"
        parser.add_argument(f"--{short}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser.format_help()
