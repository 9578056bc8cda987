"""Metrics given to loggers are seen, in the recording and in the audit, and the loggers are put back."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import conformance
from conformance.checks.reports import training_losses
from conformance.recording.loggers import Loggers


class Run:
    """Stands for wandb's."""

    got: list[dict[str, Any]]

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        self.got.append(data)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A wandb that is imported already."""
    module = types.ModuleType("wandb.sdk.wandb_run")
    module.Run = Run  # type: ignore[attr-defined] # a stand-in
    monkeypatch.setitem(sys.modules, "wandb.sdk.wandb_run", module)
    run = Run()
    run.got = []
    return run


def train(run: Run) -> None:
    """Two updates, whose losses go to the logger only."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for update in range(2):
        ids = torch.randint(8, (2, 5))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log({"train/loss": loss.item(), "lr": 0.1, "note": "text"}, step=update)


def test_the_recorder_hears_wandb(wandb: Run) -> None:
    original = Run.log
    with conformance.record() as trace:
        train(wandb)
    assert len(training_losses(trace.messages)) == 2
    assert len(wandb.got) == 2  # the run's own logger got all the same
    assert Run.log is original


def test_the_audit_hears_wandb(wandb: Run) -> None:
    with conformance.audit(updates=2) as verdict:
        train(wandb)
    assert "told-loss" in [finding.rule for finding in verdict.of("ok")]


def test_other_arguments_than_known_are_handed_on(wandb: Run) -> None:
    heard: list[str] = []
    loggers = Loggers(heard.append)
    loggers.look()
    try:
        wandb.log("no metrics at all")  # type: ignore[arg-type] # on purpose
    finally:
        loggers.leave()
    assert [str(got) for got in wandb.got] == ["no metrics at all"]
    assert heard == []


def test_tensorboards_writer_is_heard(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    heard: list[str] = []
    loggers = Loggers(heard.append)
    loggers.look()
    try:
        writer = SummaryWriter(str(tmp_path))
        writer.add_scalar("loss/train", 2.25, 7)
        writer.close()
    finally:
        loggers.leave()
    assert heard == ["step 7: loss train 2.25"]
