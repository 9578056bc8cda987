"""What the tests share: one thread, and a few batches of tokens."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread inside each test: the models are tiny, and the order of every sum is fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batches() -> list[Tensor]:
    """Three batches of token ids (B, T + 1) = (2, 9), below 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(16, (2, 9), generator=generator) for _ in range(3)]
