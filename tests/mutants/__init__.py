"""Planted faults and harmless variants of the reference: how the suite proves that it can tell them apart.

A mutant is the reference with one fault, made by replacing text in one function (now and then two). Each comes from
a published bug where there is one. ``test_mutants.py`` demands that the clauses named beside it kill it, and
that the harmless variants are killed by none. One file per chapter of clauses.
"""

from tests.mutants import (
    accumulation,
    causality,
    clipping,
    data,
    decay,
    distributed,
    dropout,
    embedding,
    evaluation,
    finetuning,
    initialization,
    loss,
    model,
    optimizer,
    optimizer_steps,
    precision,
    reports,
    resume,
    schedule,
    ties,
)
from tests.mutants.harmless import HARMLESS, Harmless
from tests.mutants.planting import Edit, Mutant, planted, resolve

__all__ = ["HARMLESS", "MUTANTS", "Edit", "Harmless", "Mutant", "planted", "resolve"]

MUTANTS: list[Mutant] = [
    *initialization.MUTANTS,
    *model.MUTANTS,
    *optimizer.MUTANTS,
    *optimizer_steps.MUTANTS,
    *decay.MUTANTS,
    *loss.MUTANTS,
    *precision.MUTANTS,
    *embedding.MUTANTS,
    *dropout.MUTANTS,
    *finetuning.MUTANTS,
    *accumulation.MUTANTS,
    *clipping.MUTANTS,
    *schedule.MUTANTS,
    *resume.MUTANTS,
    *data.MUTANTS,
    *evaluation.MUTANTS,
    *distributed.MUTANTS,
    *reports.MUTANTS,
    *causality.MUTANTS,
    *ties.MUTANTS,
]
