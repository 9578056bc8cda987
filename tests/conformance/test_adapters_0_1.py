"""Adapters written for 0.1.0 work unchanged, keep their verdicts, and can stay as of 0.1."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conformance.capabilities import CAPABILITIES, Capability
from conformance.clause import catalogue
from conformance.errors import UsageError
from conformance.loading import check_subject
from conformance.session import Session
from tests.conformance.test_session import Fake, rule, traces

HERE = Path(__file__).parent / "adapters_0_1"
# Results that 0.1.0 gave. The other two are judged in environments of their own (`nox -s peers`).
ADAPTERS = {"plain_loop_adapter:PlainLoop": "plain-loop.json", "x_transformers:XTransformers": "x-transformers.json"}


def adapter(spec: str) -> Any:
    module, _, name = spec.partition(":")
    if module != "plain_loop_adapter":
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'gpt-conformance[{module}]'")
    return getattr(importlib.import_module(f"tests.conformance.adapters_0_1.{module}"), name)()


@pytest.mark.parametrize("spec", [*ADAPTERS, "litgpt:LitGPT", "transformers:Transformers"])
def test_it_is_still_a_subject(spec: str) -> None:
    check_subject(adapter(spec), spec)


@pytest.mark.slow  # each judges all clauses
@pytest.mark.parametrize("spec", ADAPTERS)
def test_it_keeps_its_verdicts(spec: str) -> None:
    rows = json.loads((HERE / ADAPTERS[spec]).read_text(encoding="utf-8"))["clauses"]
    before = {row["id"]: row["outcome"] for row in rows}
    with Session(adapter(spec)) as session:
        after = {identity: session.judge(clause).outcome for identity, clause in catalogue().items()}
    assert {identity: after[identity] for identity in before} == before


class AsOf(Fake):
    """Written for 0.1, and says so."""

    as_of: Any = "0.1"


def test_what_is_newer_is_not_asked_of_an_adapter_as_of_an_earlier_version() -> None:
    with Session(AsOf()) as session:
        old, new = session.judge(rule(traces)), session.judge(rule(traces, since="0.2"))
    assert (old.outcome, new.outcome) == ("pass", "n/a")
    assert new.reason == "newer than as_of: new in 0.2, and the adapter was written for 0.1"
    with Session(Fake()) as session:
        assert session.judge(rule(traces, since="0.2")).outcome == "pass"


def test_a_capability_that_is_newer_counts_as_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CAPABILITIES, "flight", Capability("can fly", since="0.10"))
    with Session(AsOf()) as session:
        result = session.judge(rule(traces, "flight"))
    assert (result.outcome, result.reason) == (
        "n/a",
        "lacks flight: newer than as_of: new in 0.10, and the adapter was written for 0.1",
    )
    with Session(Fake()) as session:
        assert session.judge(rule(traces, "flight")).outcome == "pass"


@pytest.mark.parametrize("as_of", ["1", 0.1, "0.1.0", "new"])
def test_an_as_of_that_is_not_a_version_is_refused(as_of: object) -> None:
    subject = AsOf()
    subject.as_of = as_of
    with pytest.raises(UsageError, match=r"has as_of = .*: give the version of the suite as text, such as '0.1'"):
        check_subject(subject, "mine")


def test_everything_has_a_version() -> None:
    known: Mapping[str, str] = {name: capability.since for name, capability in CAPABILITIES.items()}
    assert set(known.values()) <= {"0.1", "0.2"}
    assert {clause.since for clause in catalogue().values()} <= {"0.1", "0.2"}
