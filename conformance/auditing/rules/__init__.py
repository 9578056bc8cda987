"""The rules of the audit, one file per topic. Importing this package fills :data:`conformance.auditing.rule.RULES`."""

from conformance.auditing.rules import (
    data,
    evaluation,
    expected,
    gradients,
    groups,
    loss,
    model,
    ranks,
    resume,
    resumed,
    speed,
    steps,
    targets,
    weights,
)

__all__ = [
    "data",
    "evaluation",
    "expected",
    "gradients",
    "groups",
    "loss",
    "model",
    "ranks",
    "resume",
    "resumed",
    "speed",
    "steps",
    "targets",
    "weights",
]
