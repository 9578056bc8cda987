"""The host never waits for a GPU in the midst of an update: it launches all of it, and then reads what came out.

Nor does it waste the time that the GPU has nothing to do.
"""

import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bench.models import Updates, draw, random_batches
from reference.config import GPTConfig, TrainConfig
from reference.model.loss import batch_loss
from reference.training import run
from reference.training.run import Run, seed_dropout
from reference.training.trainer import Trainer
from tests.reference.trainers import DROPPING, Bigram, fit, flat

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


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on a CPU that pretends to guard the step as a GPU does, in order."""
    seen: list[str] = []
    loss, finite = batch_loss, Run.require_finite

    def noted_loss(*arguments: Any) -> Tensor:
        seen.append("forward")
        return loss(*arguments)

    def noted_finite(self: Run, *arguments: Any) -> None:
        seen.append("wait")
        finite(self, *arguments)

    monkeypatch.setattr(run, "guard", lambda *_: True)
    monkeypatch.setattr(run, "batch_loss", noted_loss)
    monkeypatch.setattr(Run, "require_finite", noted_finite)
    return seen


def test_the_next_forward_is_launched_before_the_host_waits(order: list[str], batches: list[Tensor]) -> None:
    fit(DROPPING, batches, updates=3)
    assert order == ["forward", "forward", "wait", "forward", "wait", "wait"]


@pytest.mark.parametrize("changes", [{"save_every": 1}, {"evaluate_every": 1}, {"microbatches": 2}], ids=str)
def test_but_not_if_there_is_something_between(
    changes: dict[str, Any], order: list[str], batches: list[Tensor], tmp_path: Path
) -> None:
    fit(DROPPING, batches, batches[:1], updates=3, directory=tmp_path, **changes)
    forwards = ["forward"] * changes.get("microbatches", 1)
    assert order == [*forwards, "wait"] * 3


@pytest.mark.parametrize("model", [DROPPING, Bigram], ids=["GPT", "foreign"])
def test_a_forward_launched_early_changes_nothing(
    model: Any, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fit(model, batches, updates=6, optimizer_args={"lr": 1e-2})
    monkeypatch.setattr(run, "guard", lambda *_: True)
    early = fit(model, batches, updates=6, optimizer_args={"lr": 1e-2}, callbacks=[lambda _: torch.rand(3)])
    assert early.records == plain.records
    assert torch.equal(flat(early.model), flat(plain.model))
