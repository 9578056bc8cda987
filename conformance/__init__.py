"""Conformance suite for GPT training stacks: record what a run really did, then judge it.

    Recipe  ->  Subject.train(recipe)  ->  Trace  ->  clause  ->  Outcome  ->  report
    (what)      (the stack's own entry)    (what happened)  (a rule)

    a script, started by audit  ->  Trace  ->  rule  ->  Finding  ->  letter

To judge a stack, write a class with ``name``, ``version``, ``lacks``, ``policy`` and ``train(recipe)``
(conformance.subject.Subject) and run ``python -m conformance run --subject your.module:Class``.
"""

import conformance.interrupts  # isort: skip # noqa: F401 # first of all: Ctrl-C may come while the rest is imported

from conformance.auditing import audit
from conformance.capabilities import everything_but
from conformance.errors import ConformanceError, NotApplicable
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording import record
from conformance.recording.trace import Checkpoint, TensorInfo, Trace
from conformance.subject import Constant, Normal, Policy, Subject, TruncatedNormal, Uniform

__all__ = [
    "Checkpoint",
    "ConformanceError",
    "Constant",
    "Normal",
    "NotApplicable",
    "OptimizerChoice",
    "Policy",
    "Recipe",
    "Subject",
    "TensorInfo",
    "Trace",
    "TruncatedNormal",
    "Uniform",
    "audit",
    "everything_but",
    "record",
]
