"""README and docs tell the truth: their Python runs, their links lead somewhere, and the front is short."""

import ast
import re
from pathlib import Path

import pytest
import torch

from conformance.clause import catalogue
from conformance.loading import load_subject
from conformance.session import Session
from tests.mutants import HARMLESS, MUTANTS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(path: Path = README) -> list[str]:
    """Blocks of Python, each behind as many empty lines as stand before it, so that errors name its line."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


def test_the_front_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def test_numbers_are_true() -> None:
    text = README.read_text(encoding="utf-8")
    assert f"by {len(catalogue())} clauses" in text
    assert f"\n{len(MUTANTS)} mutants must be killed" in text
    assert f"{len(HARMLESS)} harmless variants" in text
    letter = text.partition("FAIL OPT-8  ")[2].partition("\n")[0]
    assert letter == catalogue()["OPT-8"].requirement
    for line in (f"Why it matters: {catalogue()['OPT-8'].why}", f"How to mend it: {catalogue()['OPT-8'].mend}"):
        assert line in text


def test_the_adapter_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    loop, adapter = python_blocks()[:2]
    (tmp_path / "my_loop.py").write_text(loop)
    (tmp_path / "my_adapter.py").write_text(adapter)
    with Session(load_subject("my_adapter:Mine")) as session:
        results = [session.judge(clause) for clause in catalogue().values()]
    counted = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("pass", "fail", "n/a", "error")}
    text = README.read_text(encoding="utf-8")
    said = re.search(r"The loop passes (\d+) clauses and fails (\w+):", text)
    rest = re.search(r"The other (\d+) are `n/a`", text)
    assert said
    assert rest
    assert counted == {"pass": int(said[1]), "fail": {"three": 3}[said[2]], "n/a": int(rest[1]), "error": 0}
    failed = {result.clause.id for result in results if result.outcome == "fail"}
    assert failed == set(re.findall(r"\(([A-Z]+-\d+)\)", text.partition("The loop passes")[2].partition("]")[0]))


def test_rules_work_on_a_users_own_objects() -> None:
    before = torch.get_rng_state()
    page = ROOT / "docs" / "adapters.md"
    exec(compile(python_blocks(page)[-1], str(page), "exec"), {})
    torch.set_rng_state(before)


def test_reference_learns(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks()[2], "README.md", "exec"), {})
    first, last = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert last < first - 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_parses_and_links_lead_somewhere(page: Path) -> None:
    for block in python_blocks(page):
        ast.parse(block)
    text = page.read_text(encoding="utf-8")
    anchors = re.findall(r'<a id="([^"]+)">', text)
    assert len(anchors) == len(set(anchors))
    links = re.findall(r"(?<!\\)\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            found = target.read_text(encoding="utf-8")
            titles = [
                re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in found.splitlines()
            ]
            assert f'<a id="{anchor}">' in found or anchor in titles, link
