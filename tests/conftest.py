"""What the tests share: one thread, and a few batches of tokens."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

# Collections of garbage took a tenth of the time: they look at what torch and the tests have imported, half a million
# objects.
gc.set_threshold(20_000, 20)

# Autograd starts now, before a test compiles something: a PyTorch that is built for CUDA would otherwise refuse to work
# in a fork where there is no GPU (conformance.recording.ranks.works_in_a_fork), and some tests fork.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """Flush no file: whether its bytes have arrived shows only when the power fails, and each flush takes milliseconds.

    Processes that a test starts anew flush as ever, and tests that look at flushes put a function of their own here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect() -> None:
    """Set aside what earlier files have imported, for the collections that some tests ask for."""
    gc.collect()
    gc.freeze()


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
