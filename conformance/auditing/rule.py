"""What a rule of the audit is, and the list of all."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from conformance.auditing.facts import Facts
from conformance.errors import Violation

Kind = Literal["fault", "advice"]


class Doubt(Violation):
    """What a rule found is usually wrong, but may be meant: advice, not a fault."""


@dataclass(frozen=True)
class Seen:
    """What a rule judges: one process's facts, those of all processes, and what the user expects."""

    facts: Facts
    ranks: list[Facts] = field(default_factory=list)
    expected: Mapping[str, str] = field(default_factory=dict)
    earlier: Facts | None = None
    """Of the run that left the checkpoint from which this one goes on."""


@dataclass(frozen=True)
class Rule:
    """A rule. It raises Violation for a fault, Doubt for advice, NotApplicable where it could not look."""

    name: str
    topic: str
    kind: Kind
    """``advice`` if all that it finds is advice."""
    requirement: str
    """What a healthy run does: one sentence."""
    why: str
    mend: str
    source: str
    check: Callable[[Seen], None]
    together: bool
    """It compares the processes; the others judge each process by itself."""


RULES: dict[str, Rule] = {}
TOPICS = {
    "weights": "weights, at the start and later",
    "groups": "parameter groups of the optimizers",
    "gradients": "gradients, clipping and the step",
    "steps": "when optimizers and schedules step, and with which settings",
    "data": "batches and targets",
    "targets": "which tokens of a sequence are targets",
    "loss": "how the loss is computed and reported",
    "model": "training mode, and what a logit depends on",
    "evaluation": "evaluation during training",
    "resume": "loading a checkpoint to resume from",
    "ranks": "several processes, compared with each other",
    "resumed": "the run that --resume-with starts",
    "speed": "speed",
    "expected": "what you expect, given by --expect",
}


def rule(
    name: str, topic: str, why: str, mend: str, source: str = "", advice: bool = False, together: bool = False
) -> Callable[[Callable[[Seen], None]], Callable[[Seen], None]]:
    """Add a function to the rules. The first sentence of its docstring is the requirement."""

    def add(check: Callable[[Seen], None]) -> Callable[[Seen], None]:
        requirement = (inspect.getdoc(check) or "").partition("\n\n")[0].replace("\n", " ")
        RULES[name] = Rule(
            name, topic, "advice" if advice else "fault", requirement, why, mend, source, check, together
        )
        return check

    return add
