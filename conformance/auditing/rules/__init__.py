"""The rules of the audit, one file per topic. Importing this package fills :data:`conformance.auditing.rule.RULES`."""

from conformance.auditing.rules import (
    clipping,
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
    "clipping",
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
