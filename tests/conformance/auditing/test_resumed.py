"""The rules of ``--resume-with``: a run beside the one that left its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import conformance
from conformance.auditing.facts import Facts
from conformance.auditing.judging import judge_resumed
from conformance.auditing.rule import RULES
from conformance.cli import main
from tests.conformance.auditing.loop import SCRIPT

FAULTS = ("weights", "optimizer", "rate", "data")


def run(saved: dict[str, Any] | None, fault: str = "") -> tuple[Facts, dict[str, Any]]:
    """Train four updates, audited; return the facts, and a checkpoint after the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (update + 1))
    data = torch.Generator().manual_seed(1)
    start = 0
    if saved is not None:
        start = saved["update"]
        if fault != "weights":
            model.load_state_dict(saved["model"])
        if fault != "optimizer":
            optimizer.load_state_dict(saved["optimizer"])
        if fault != "rate":
            scheduler.load_state_dict(saved["scheduler"])
        if fault != "data":
            data.set_state(saved["data"])
    checkpoint: dict[str, Any] = {}
    with conformance.audit(updates=4, then="go-on") as verdict:
        for update in range(start, 6):
            ids = torch.randint(16, (4, 9), generator=data)
            nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if update == 1:
                parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                states = {name: part.state_dict() for name, part in parts.items()}
                checkpoint = torch.load(kept({**states, "data": data.get_state(), "update": 2}), weights_only=False)
    assert verdict.facts is not None
    return verdict.facts, checkpoint


def kept(content: dict[str, Any]) -> Any:
    """Write a checkpoint into memory: what is kept must not change with the run."""
    import io

    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    return stream


@pytest.fixture(scope="module")
def first() -> tuple[Facts, dict[str, Any]]:
    """A run and its checkpoint."""
    return run(None)


def outcomes(first: Facts, second: Facts) -> dict[str, str]:
    """What each rule finds."""
    return {finding.rule: finding.outcome for finding in judge_resumed(first, second)}


def test_a_healthy_resume_is_ok(first: tuple[Facts, dict[str, Any]]) -> None:
    found = outcomes(first[0], run(first[1])[0])
    assert found == dict.fromkeys((f"resumed-{name}" for name in FAULTS), "ok")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_rule_finds_what_is_lost(fault: str, first: tuple[Facts, dict[str, Any]]) -> None:
    assert outcomes(first[0], run(first[1], fault)[0])[f"resumed-{fault}"] == "fault"


def test_these_are_all_rules_of_the_topic() -> None:
    assert {rule.name for rule in RULES.values() if rule.topic == "resumed"} == {f"resumed-{name}" for name in FAULTS}


@pytest.mark.slow
def test_the_command_runs_both_scripts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = SCRIPT.replace("import torch\n", "import sys, torch\n", 1).replace(
        "for step in range(6):",
        "start = 0\n"
        "if '--resume' in sys.argv:\n"
        f"    saved = torch.load({str(tmp_path / 'ckpt.pt')!r})\n"
        "    model.load_state_dict(saved['model']); start = saved['step']\n"
        "for step in range(start, 6):\n"
        "    if step == 2:\n"
        f"        torch.save({{'model': model.state_dict(), 'step': 2}}, {str(tmp_path / 'ckpt.pt')!r})",
    )
    (tmp_path / "train.py").write_text(text, encoding="utf-8")
    script = str(tmp_path / "train.py")
    code = main(["audit", "--resume-with", f"python {script} --resume", "--", script])
    letter = capfd.readouterr().err
    assert code == 1
    assert "FAULT resumed-optimizer" in letter
    assert "✓resumed-weights" in letter
