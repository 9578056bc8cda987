"""The record of a run on disk, for ``conformance diff``: one file for each process, readable without running code."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from conformance.auditing.facts import Backward, Clip, Facts
from conformance.errors import UsageError, describe_error
from conformance.reading import require_file
from conformance.recording.trace import (
    CrossEntropy,
    EmbeddingInfo,
    Forward,
    Group,
    Loss,
    Measures,
    Named,
    Step,
    TensorInfo,
    Trace,
    Update,
)

SCHEMA = 1
KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Backward, Clip, CrossEntropy, EmbeddingInfo, Facts, Forward, Group),
        *(Loss, Measures, Step, TensorInfo, Trace, Update),
    )
}
LEFT_OUT = {"said", "given", "probed", "noticed", "checkpoints", "messages", "changed_configs", "notes"}
"""Fields of facts and traces that a comparison does not need."""


def save(facts: Facts, folder: Path) -> Path:
    """Write the record of this process, and return the file.

    Raises:
        UsageError: if the disk does not take it.
    """
    path = folder / f"process-{facts.rank}.pt"
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:  # so that the system's errors, of a full disk say, are Python's
            torch.save({"schema": SCHEMA, "facts": encoded(facts)}, file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch makes the second of the first
        said = error if isinstance(error, OSError) else error.__context__
        reason = getattr(said, "strerror", None) or describe_error(error)
        raise UsageError(f"the record could not be written to {folder}: {reason}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def load(folder: Path) -> list[Facts]:
    """Return the record of each process in a folder, by rank.

    Raises:
        UsageError: if the folder holds no record, or one that cannot be read.
    """
    files = sorted(folder.glob("process-*.pt"), key=lambda path: (len(path.name), path.name))
    if not files:
        raise UsageError(
            f"there is no record of a run in {folder}: make one with "
            f"python -m conformance audit --trace {folder} -- ..."
        )
    return [read(path) for path in files]


def read(path: Path) -> Facts:
    """Return one record."""
    require_file(path, "record", most=None)
    try:
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged file makes torch raise
        # Without torch's own words: they advise to switch the protection against hostile files off.
        raise UsageError(
            f"the record {path} cannot be read: it is damaged, or holds more than tensors and values. Make it again."
        ) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UsageError(
            f"the record {path} does not have schema {SCHEMA}, which this version reads: record the run again."
        )
    try:
        facts = decoded(content["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the record {path} is damaged ({error!r}): record the run again.") from None
    if not isinstance(facts, Facts):
        raise UsageError(f"the record {path} is damaged (it holds no facts): record the run again.")
    return facts


def encoded(value: Any) -> Any:
    """Return a record as dictionaries, lists, numbers, text and tensors."""
    kind = type(value).__name__
    if KINDS.get(kind) is type(value):
        fields = [field.name for field in dataclasses.fields(KINDS[kind]) if field.name not in LEFT_OUT]
        return {"_kind": kind, **{name: encoded(getattr(value, name)) for name in fields}}
    if isinstance(value, Named):
        return {"_kind": "Named", "names": list(value), "values": [encoded(item) for item in value.values()]}
    if isinstance(value, dict):
        return {"_kind": "dict", "names": list(value), "values": [encoded(item) for item in value.values()]}
    if isinstance(value, tuple):
        return {"_kind": "tuple", "values": [encoded(item) for item in value]}
    if isinstance(value, set):
        return {"_kind": "set", "values": sorted(value)}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.clone()  # not a view of one large storage, which would be saved whole
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    return repr(value)


def decoded(value: Any) -> Any:
    """Return what :func:`encoded` was given."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value["_kind"]
    if kind == "tuple":
        return tuple(decoded(item) for item in value["values"])
    if kind == "set":
        return set(value["values"])
    if kind in ("Named", "dict"):
        pairs = zip(value["names"], map(decoded, value["values"]), strict=True)
        return Named(pairs) if kind == "Named" else dict(pairs)
    return KINDS[kind](**{name: decoded(item) for name, item in value.items() if name != "_kind"})
