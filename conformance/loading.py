"""From the name that a user gives to the subject that it means."""

import importlib
import os
import re
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import cast

from conformance.capabilities import CAPABILITIES, nearest
from conformance.errors import UsageError, describe_error
from conformance.scripts import parsed, trains_on_import
from conformance.subject import Subject

BUILT_IN = {
    "reference": "conformance.subjects.reference:Reference",
    "accelerate": "conformance.subjects.accelerate:Accelerate",
    "deepspeed": "conformance.subjects.deepspeed:DeepSpeed",
    "lightning-trainer": "conformance.subjects.lightning_trainer:LightningTrainer",
    "litgpt": "conformance.subjects.litgpt:LitGPT",
    "litgpt-lora": "conformance.subjects.litgpt_lora:LitGPTLora",
    "nanochat": "conformance.subjects.nanochat:Nanochat",
    "nanogpt": "conformance.subjects.nanogpt:NanoGPT",
    "torchtitan": "conformance.subjects.torchtitan:Torchtitan",
    "transformers": "conformance.subjects.transformers:Transformers",
    "transformers-peft": "conformance.subjects.transformers_peft:TransformersPeft",
    "trl": "conformance.subjects.trl:Trl",
    "x-transformers": "conformance.subjects.x_transformers:XTransformers",
}
"""Subjects that come with the suite. Each is installed by an extra of the same name; nanogpt needs none."""
INSTEAD = (
    "audit it with python -m conformance audit -- {0}, or write an adapter for it with python -m conformance "
    "new-adapter {0}."
)
POLICY_METHODS = ("initial", "decays", "learning_rate")


def load_subject(spec: str) -> Subject:
    """Return the subject that ``spec`` names: ``reference``, ``litgpt``, or ``package.module:Attribute``, or
    ``path/adapter.py:Attribute``.

    The attribute is an adapter class, which is called without arguments, or an adapter.

    Raises:
        UsageError: if there is no such thing, or it is not a Subject.
    """
    path = BUILT_IN.get(spec, spec)
    module_name, colon, attribute = path.partition(":")
    if not colon and Path(spec).suffix == ".py" and Path(spec).is_file():
        raise UsageError(f"the subject {spec!r} is a file, but no adapter in it is named: {INSTEAD.format(spec)}")
    if not colon:
        raise UsageError(f"unknown subject {spec!r}: give one of {', '.join(sorted(BUILT_IN))}, or module:Attribute.")
    if module_name.endswith(".py"):
        module_name = module_of(Path(module_name), spec)
    if os.getcwd() not in sys.path:  # as `python -m` has it: an adapter is often a file beside the user
        sys.path.insert(0, os.getcwd())
    require_no_script(module_name, spec)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"the subject {spec!r} cannot be imported: {describe_error(error)}. {install_hint(spec, error)}"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a script that is imported may parse a command line and quit
        raise UsageError(f"importing the subject {spec!r} raised {describe_error(error)}.") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UsageError(
            f"the module {module_name} has no attribute {attribute!r}: give the name of your adapter there."
        )
    doing = "making"
    try:
        subject = found() if isinstance(found, type) else found
        doing = "reading the attributes of"
        check_subject(subject, spec)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a constructor or a property may raise anything
        raise UsageError(f"{doing} the subject {spec!r} raised {describe_error(error)}.") from error
    return cast(Subject, subject)


def require_no_script(module_name: str, spec: str) -> None:
    """Raise UsageError if importing a module would train: it is a script, not an adapter. Its text tells."""
    file = None if module_name in sys.modules else source_of(module_name)
    if file is None:
        return
    try:
        tree = parsed(file)
    except UsageError:  # not Python: its import tells
        return
    if trains_on_import(tree):
        raise UsageError(
            f"the subject {spec!r} is a script, which would train while it is imported: "
            f"{INSTEAD.format(os.path.relpath(file))}"
        )


def source_of(module_name: str) -> Path | None:
    """Return the file of a module, without importing the packages around it; None if there is none to read."""
    found, places = None, None
    parts = module_name.split(".")
    for count in range(1, len(parts) + 1):
        try:
            found = PathFinder.find_spec(".".join(parts[:count]), places)
        except (ImportError, ValueError, OSError):  # a name that no module can have
            return None
        if found is None:
            return None
        places = list(found.submodule_search_locations or ())
    source = found is not None and isinstance(found.loader, SourceFileLoader)
    return Path(found.origin) if source and found is not None and found.origin is not None else None


def module_of(path: Path, spec: str) -> str:
    """Return the name by which a file can be imported, and put its folder on the path.

    Raises:
        UsageError: if there is no such file, or no module can have its name.
    """
    if not path.is_file():
        raise UsageError(f"the subject {spec!r} names a file that is not there: correct the path.")
    if not path.stem.isidentifier():
        raise UsageError(f"Python cannot import a file named {path.name}: give it a name such as my_adapter.py.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return path.stem


def install_hint(spec: str, error: ImportError) -> str:
    """Return what to do about a failed import."""
    if spec in BUILT_IN and error.name and not error.name.startswith("conformance"):
        return f"Install it with: pip install 'gpt-conformance[{spec}]'."
    return "Correct the path, or install what it needs."


def check_subject(subject: object, spec: str) -> None:
    """Raise UsageError if an object does not have what a Subject needs, or lacks an unknown capability."""
    for attribute, kind in (("name", str), ("version", str), ("lacks", Mapping)):
        if not isinstance(getattr(subject, attribute, None), kind):
            raise UsageError(f"{spec!r} is not a Subject: it needs an attribute {attribute!r} of type {kind.__name__}.")
    for owner, method in ((subject, "train"), *((getattr(subject, "policy", None), m) for m in POLICY_METHODS)):
        if not callable(getattr(owner, method, None)):
            where = "" if owner is subject else "policy."
            raise UsageError(f"{spec!r} is not a Subject: it needs a method {where}{method}().")
    lacks: Mapping[object, object] = getattr(subject, "lacks")  # noqa: B009 # an object has no attributes to mypy
    for capability, reason in lacks.items():
        if capability not in CAPABILITIES:
            raise UsageError(f"{spec!r} lacks the unknown capability {capability!r}: {nearest(capability)}")
        if not isinstance(reason, str) or not reason.strip():
            raise UsageError(f"{spec!r} lacks {capability!r} without a reason: write a reason that a reader can check.")
    if not callable(getattr(subject, "load", None)) and "load" not in lacks:
        raise UsageError(f"{spec!r} has no method load(): add it, or name 'load' in lacks, with a reason.")
    as_of = getattr(subject, "as_of", None)
    if as_of is not None and not (isinstance(as_of, str) and re.fullmatch(r"\d+\.\d+", as_of)):
        raise UsageError(f"{spec!r} has as_of = {as_of!r}: give the version of the suite as text, such as '0.1'.")
