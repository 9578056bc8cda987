"""The rules of speed, on facts as a GPU would have given them."""

import pytest
import torch

from conformance.auditing.facts import Facts
from conformance.auditing.judging import judge
from conformance.auditing.rule import RULES, Seen
from tests.conformance.auditing.made_up import healthy


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Facts:
    """A healthy run on a card whose peak is known."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    facts = healthy()
    facts.device = "cuda"
    return facts


def outcome(rule: str, facts: Facts) -> tuple[str, str]:
    """What a rule finds."""
    finding = judge(RULES[rule], Seen(facts, [facts]))
    return finding.outcome, finding.seen or finding.reason


def test_a_gpu_that_waits_is_told(on_gpu: Facts) -> None:
    on_gpu.idle = (1, 20)
    assert outcome("gpu-waits", on_gpu)[0] == "ok"
    on_gpu.idle = (9, 20)
    found, words = outcome("gpu-waits", on_gpu)
    assert found == "advice"
    assert "9 of 20" in words


def test_a_low_utilisation_is_told_with_a_guess(on_gpu: Facts) -> None:
    tokens = sum(f.ids.numel() for f in on_gpu.trace.forwards if f.grad_enabled and f.update == 1)
    weights = sum(torch.Size(info.shape).numel() for info in on_gpu.trace.tensors.values())
    fast = 6 * weights * tokens / 989e12 / 0.4  # an MFU of 40 %
    on_gpu.seconds = [fast, fast, fast]
    assert outcome("mfu", on_gpu)[0] == "ok"
    on_gpu.seconds = [fast * 10] * 3
    found, words = outcome("mfu", on_gpu)
    assert found == "advice"
    assert "4%" in words
    assert "computes in float32" in words


def test_on_a_cpu_nothing_is_said() -> None:
    assert outcome("mfu", healthy())[0] == outcome("gpu-waits", healthy())[0] == "not looked at"
