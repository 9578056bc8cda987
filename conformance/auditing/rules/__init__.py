"""The rules of the audit, one file per topic. Importing this package fills :data:`conformance.auditing.rule.RULES`."""

from conformance.auditing.rules import data, expected, gradients, groups, loss, model, ranks, speed, weights

__all__ = ["data", "expected", "gradients", "groups", "loss", "model", "ranks", "speed", "weights"]
