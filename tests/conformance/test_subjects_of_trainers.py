"""The adapters of trainers that people use: they stay small, and fail what their committed report says."""

import importlib.util
from pathlib import Path

import pytest

from conformance.clause import catalogue
from conformance.loading import BUILT_IN, load_subject
from conformance.report.result import read_report
from conformance.session import Session

ROOT = Path(__file__).parents[2]
NEEDS = {
    "lightning-trainer": ("lightning", "torchdata", "grokadamw"),
    "accelerate": ("accelerate", "grokadamw"),
    "deepspeed": ("deepspeed", "grokadamw"),
    "trl": ("trl", "grokadamw"),
    "torchtitan": ("torchtitan",),
}
"""What must be installed to judge a subject as its report did."""
REPORTS = {name: sorted((ROOT / "reports" / "conformance").glob(f"{name}-[0-9]*.json")) for name in NEEDS}
"""Results of each subject that are committed, of all releases and machines."""


@pytest.mark.parametrize("name", NEEDS)
def test_it_stays_small(name: str) -> None:
    module = BUILT_IN[name].partition(":")[0]
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120


@pytest.mark.parametrize(("name", "path"), [(name, paths[-1]) for name, paths in REPORTS.items() if paths])
def test_every_failure_is_explained(name: str, path: Path) -> None:
    report = read_report(path)
    explained = (ROOT / "reports" / "findings" / f"{name.removesuffix('-trainer')}.md").read_text(encoding="utf-8")
    failed = [identity for identity, verdict in report.verdicts.items() if verdict.outcome == "fail"]
    assert [identity for identity in failed if identity not in explained] == []
    assert not [identity for identity, verdict in report.verdicts.items() if verdict.outcome == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning-trainer", "accelerate"])
def test_it_fails_what_its_report_says(name: str) -> None:
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    subject = load_subject(name)
    path = ROOT / "reports" / "conformance" / f"{name}-{subject.version}-cpu.json"
    if not path.exists():
        pytest.skip(f"{name} {subject.version} is installed, and no report of this release is committed")
    report = read_report(path)
    with Session(subject) as session:
        found = {identity: session.judge(clause).outcome for identity, clause in catalogue().items()}
    assert found == {identity: report.verdicts[identity].outcome for identity in found}
