"""The page of an audit: what is wrong first, every rule on it, nothing fetched, and no text of the run as markup."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.auditing.facts import Facts
from conformance.auditing.judging import judge_alone
from conformance.auditing.page import curve, write_page
from conformance.auditing.verdict import Verdict
from conformance.errors import UsageError
from tests.conformance.auditing.made_up import SHAPES, UPDATES, healthy
from tests.conformance.test_page import HOSTILE, Page


def audited(facts: Facts | None, path: Path, **more: Any) -> tuple[Page, Verdict]:
    """Write the page about facts."""
    found = judge_alone(facts, {}) if facts is not None else []
    verdict = Verdict(findings=found, facts=facts, environment={"torch": "2.13"}, **more)
    write_page(verdict, path)
    return Page(path), verdict


def spoilt() -> Facts:
    """Facts of a run whose rate is 0 at first."""
    facts = healthy()
    (group,) = facts.trace.updates[0].steps[0].groups
    still = replace(group, settings=dict(group.settings) | {"lr": 0.0})
    steps = (replace(facts.trace.updates[0].steps[0], groups=(still,)),)
    facts.trace.updates[0] = replace(facts.trace.updates[0], steps=steps)
    return facts


def test_what_is_wrong_comes_first_and_its_source_is_folded(tmp_path: Path) -> None:
    shown, verdict = audited(spoilt(), tmp_path / "page.html")
    told = verdict.of("fault", "advice")
    assert told
    entries = [a for tag, a in shown.tags if tag == "details" and "id" in a]
    assert [a["id"] for a in entries[: len(told)]] == [finding.rule for finding in told]
    assert ["open" in a for a in entries] == [number < len(told) for number in range(len(entries))]
    assert sorted(a["id"] for a in entries) == sorted(finding.rule for finding in verdict.findings)
    text = " ".join(shown.text.split())
    for finding in told:
        places = [
            text.index(" ".join(part.replace("`", "").split())) for part in (finding.seen, finding.why, finding.mend)
        ]
        assert places == sorted(places)
    assert shown.text.count("Where this was seen before") == sum(bool(finding.source) for finding in told)
    assert f"{len(verdict.of('ok'))} ok," in text
    assert not shown.all("src") + shown.all("style")


def test_a_page_about_nothing_says_so(tmp_path: Path) -> None:
    shown, _ = audited(None, tmp_path / "page.html")
    for sentence in ("saw no loss, no gradient norm and no learning rate", "did not see the parameter groups"):
        assert sentence in shown.text
    with pytest.raises(UsageError, match=r"the page .* cannot be written: "):
        write_page(Verdict(), tmp_path)


def test_no_text_of_the_run_gets_in_as_markup(tmp_path: Path) -> None:
    found = [replace(finding, outcome="fault", seen=HOSTILE, source=HOSTILE) for finding in judge_alone(healthy(), {})]
    verdict = Verdict(findings=found, facts=healthy(), environment={HOSTILE: HOSTILE}, broken=HOSTILE)
    write_page(verdict, tmp_path / "page.html")
    shown = Page(tmp_path / "page.html")
    assert [tag for tag, _ in shown.tags if tag in ("script", "img")] == ["script"]
    assert HOSTILE in shown.text


def test_compiled_code_is_told(tmp_path: Path) -> None:
    words = "did not look inside compiled code"
    facts = healthy()
    assert words not in audited(facts, tmp_path / "page.html")[0].text
    facts.compiled = True
    assert words in audited(facts, tmp_path / "page.html")[0].text


def test_tensors_and_updates_are_shown(tmp_path: Path) -> None:
    shown, _ = audited(healthy(), tmp_path / "page.html")
    assert all(name in shown.text for name in SHAPES)
    assert [tag for tag, _ in shown.tags].count("circle") >= 2 * UPDATES


def test_a_curve_is_flat_where_its_labels_would_be_equal() -> None:
    clipped = curve("Norm", "", [0.5, 0.4999999, 0.5])
    assert clipped is not None
    assert (clipped.top, clipped.middle, clipped.bottom) == ("", "0.5", "")
    assert len({y for _, y, _ in clipped.dots}) == 1
    falling = curve("Loss", "", [4.6, 4.5, None])
    assert falling is not None
    assert (falling.top, falling.middle, falling.bottom) == ("4.6", "", "4.5")
    assert falling.dots[0][1] < falling.dots[1][1], "down the page"
    assert curve("Loss", "", [None]) is None
