"""A second round of blind faults: others than those of the first, written in the same way and judged once.

Each comes from a published bug. The first round's clauses were mended since, so only faults that nobody has judged yet
can say how many of all faults the suite finds.
"""

from tests.mutants.blind.second import embedding, gradient, model, optimizer, run
from tests.mutants.planting import Mutant

FAULTS: dict[str, list[Mutant]] = dict(
    sorted({**gradient.FAULTS, **model.FAULTS, **optimizer.FAULTS, **run.FAULTS, **embedding.FAULTS}.items())
)
"""By chapter."""
