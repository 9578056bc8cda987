"""Conformance suite for GPT training stacks: record what a run really did, then judge it.

    Recipe  ->  Subject.train(recipe)  ->  Trace  ->  clause  ->  Outcome  ->  report
    (what)      (the stack's own entry)    (what happened)  (a rule)

To judge a stack, write a class with ``name``, ``version``, ``lacks``, ``policy`` and ``train(recipe)``
(conformance.subject.Subject) and run ``pytest --pyargs conformance.suites --subject your.module:Class``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.recipe import OptimizerChoice, Recipe
    from conformance.recording.recorder import record
    from conformance.recording.trace import Checkpoint, TensorInfo, Trace
    from conformance.subject import Constant, Normal, Subject, Uniform, everything_but

_HOME = {
    "Checkpoint": "recording.trace",
    "Constant": "subject",
    "Normal": "subject",
    "OptimizerChoice": "recipe",
    "Recipe": "recipe",
    "Subject": "subject",
    "TensorInfo": "recording.trace",
    "Trace": "recording.trace",
    "Uniform": "subject",
    "everything_but": "subject",
    "record": "recording.recorder",
}

__all__ = [
    "Checkpoint",
    "Constant",
    "Normal",
    "OptimizerChoice",
    "Recipe",
    "Subject",
    "TensorInfo",
    "Trace",
    "Uniform",
    "everything_but",
    "record",
]


def __getattr__(name: str) -> Any:
    # Lazily: the pytest plugin lives in this package and is loaded by every pytest run of whoever installs it.
    if name not in _HOME:
        raise AttributeError(f"module 'conformance' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}.")
    return getattr(import_module(f"conformance.{_HOME[name]}"), name)
