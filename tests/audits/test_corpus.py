"""The audit on honest scripts and on planted faults: a handful always, all of them with ``-m slow``."""

import re

import pytest

from tests.audits.faults import Fault
from tests.audits.faults.harmless import HARMLESS
from tests.audits.runner import missing, names
from tests.audits.score import audit_fault, audit_honest, faults, names_the, new_findings, read

TRUE = {
    "hf_trainer": {"first-rate-0", "first-counted"},  # its warm-up begins at 0; it counts GPT-2's first tokens
}
"""What an audit rightly says of an honest script."""
CHEAP = ("resumable: the optimizer's state is not loaded", "masked_sft: a mean per microbatch, then their mean")
BEYOND = {
    "fsdp2_by_hand: is not causal": "the audit runs no sharded model by itself",
}
"""Faults that are not named, and why."""


def needs(script: str) -> None:
    """Skip a test whose script needs a package that is not installed."""
    if reason := missing(script):
        pytest.skip(reason)


def check_honest(script: str) -> None:
    """Check that an honest script is told nothing but what is true of it."""
    needs(script)
    found = audit_honest(script)
    assert found.code == 0, found.output
    assert found.findings, found.output
    said = {finding["rule"]: finding["outcome"] for finding in found.found("fault", "advice")}
    assert set(said) <= TRUE.get(script, set()), found.output
    assert "fault" not in said.values()


def check_fault(fault: Fault) -> None:
    """Check that a planted fault is named."""
    needs(fault.script)
    found, honest = audit_fault(fault), audit_honest(fault.script, bool(fault.arguments))
    assert any(names_the(fault, finding) for finding in new_findings(found, honest)), found.output


def test_every_fault_can_be_planted_and_is_told_apart() -> None:
    planted = [(fault.script, fault.planted(read(fault.script))) for fault in faults()]
    assert len({fault.id for fault in faults()}) == len(planted) >= 66
    assert len(set(planted)) == len(planted)
    for script, text in planted:
        compile(text, script, "exec")
    assert BEYOND.keys() < {fault.id for fault in faults()}


@pytest.mark.parametrize("script", ["masked_sft", "resumable"])
def test_some_honest_scripts_are_left_alone(script: str) -> None:
    check_honest(script)


@pytest.mark.parametrize("fault", [f for f in faults() if f.id in CHEAP], ids=lambda fault: fault.id)
def test_some_faults_are_named(fault: Fault) -> None:
    check_fault(fault)


@pytest.mark.slow
@pytest.mark.parametrize("script", names())
def test_honest_scripts_are_left_alone(script: str) -> None:
    check_honest(script)


@pytest.mark.planted
@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.id)
def test_harmless_changes_are_left_alone(change: Fault) -> None:
    needs(change.script)
    found = audit_fault(change)
    assert found.findings, found.output
    accused = [f["rule"] for f in found.found("fault")]
    advised = [f["rule"] for f in found.found("advice") if not re.fullmatch(change.words, f["rule"])]
    assert not accused + advised, found.output


@pytest.mark.planted
@pytest.mark.parametrize("fault", [f for f in faults() if f.id not in BEYOND], ids=lambda fault: fault.id)
def test_faults_are_named(fault: Fault) -> None:
    check_fault(fault)
