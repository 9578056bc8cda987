"""Faults that were written without reading the clauses, five for each chapter: a blind test of the suite.

A mutant of the kill matrix is written beside the clause that it kills, so it proves that the clause can fail, and
nothing about the faults that nobody thought of. These were written from the reference's own code and from published
bugs alone, before anyone looked which clause would see them, and were judged once. The list stays as it is: mutants
that mark what was mended afterwards stand in the kill matrix.
"""

from tests.mutants.blind import embedding, gradient, model, optimizer, run
from tests.mutants.planting import Mutant

FAULTS: dict[str, list[Mutant]] = dict(
    sorted({**gradient.FAULTS, **model.FAULTS, **optimizer.FAULTS, **run.FAULTS, **embedding.FAULTS}.items())
)
"""By chapter."""
