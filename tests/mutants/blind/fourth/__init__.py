"""A fourth round of blind faults: others than those of the first three, written in the same way and judged once.

Half of them come from a published bug, the others are slips that are common in training code, and say so. The clauses
were mended after the earlier rounds, so only faults that nobody has judged yet can say how many of all faults the suite
finds.
"""

from tests.mutants.blind.fourth import embedding, gradient, model, optimizer, run
from tests.mutants.planting import Mutant

FAULTS: dict[str, list[Mutant]] = dict(
    sorted({**gradient.FAULTS, **model.FAULTS, **optimizer.FAULTS, **run.FAULTS, **embedding.FAULTS}.items())
)
"""By chapter."""
