"""A third round of blind faults: others than those of the first two, written in the same way and judged once.

Each comes from a published bug. The clauses were mended after both earlier rounds, so only faults that nobody has
judged yet can say how many of all faults the suite finds.
"""

from tests.mutants.blind.third import embedding, gradient, model, optimizer, run
from tests.mutants.planting import Mutant

FAULTS: dict[str, list[Mutant]] = dict(
    sorted({**gradient.FAULTS, **model.FAULTS, **optimizer.FAULTS, **run.FAULTS, **embedding.FAULTS}.items())
)
"""By chapter."""
