"""A DataLoader that knows how far it is: for stacks that save their loader, as litdata's StreamingDataLoader lets them.

LitGPT would pickle a plain DataLoader into its checkpoint, and torch >= 2.6 refuses to load that.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class ResumableLoader(DataLoader[torch.Tensor]):
    """Batches of the rows of one tensor, in order; after a load the first pass goes on where it was."""

    position, skip = 0, 0

    def __init__(self, rows: torch.Tensor, batch_size: int) -> None:
        super().__init__(rows, batch_size=batch_size)  # type: ignore[arg-type] # a tensor has getitem and len

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator will do
        skip, self.skip = self.skip, 0
        for self.position, batch in enumerate(super().__iter__(), start=1):
            if self.position > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this pass were given."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after that many batches."""
        self.skip = state["position"]
