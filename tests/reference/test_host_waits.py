"""The host never waits for a GPU in the midst of an update: it launches all of it, and then reads what came out.

Nor does it waste the time that the GPU has nothing to do.
"""

import traceback
from functools import partial
from typing import Any

import pytest
import torch

from conformance.bench.models import Updates, draw, random_batches
from reference.config import GPTConfig, TrainConfig
from reference.training.run import seed_dropout
from reference.training.trainer import Trainer

SHAPE = GPTConfig.gpt2(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # it misses some waits
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("changes", [{}, {"microbatches": 3, "clip": None}], ids=str)
def test_an_update_waits_for_its_own_figures_only(precision: str, changes: dict[str, object]) -> None:
    device = torch.device("cuda")
    train = TrainConfig(updates=100, accelerator="cuda", precision=precision, **changes)  # type: ignore[arg-type] # of several types
    run = Trainer(partial(draw, SHAPE, device), train).setup()
    updates = Updates(run, random_batches(SHAPE, 2, device), SHAPE.init_std)
    for _ in range(3):  # the optimizer's state is created
        updates.step()
    try:
        torch.cuda.set_sync_debug_mode("error")  # of all but events, for which the trainer waits on purpose
        updates.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert updates.update == 4


def test_dropout_is_seeded_as_by_manual_seed_but_no_stack_is_formatted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    expected = torch.rand(8)
    formatted: list[Any] = []
    monkeypatch.setattr(traceback, "format_stack", lambda: formatted.append(1))
    seed_dropout(5, torch.device("cpu"))
    assert torch.equal(torch.rand(8), expected)
    assert formatted == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_on_a_gpu_is_seeded_as_by_manual_seed() -> None:
    torch.manual_seed(5)
    expected = torch.rand(8, device="cuda")
    seed_dropout(5, torch.device("cuda", 0))
    assert torch.equal(torch.rand(8, device="cuda"), expected)
