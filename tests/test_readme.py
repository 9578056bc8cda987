"""The README tells the truth: its Python runs as it stands, and its table is the catalogue.

``python -m tests.test_readme`` writes the table.
"""

import re
import sys
from pathlib import Path

import pytest

from conformance.clause import CHAPTERS, catalogue
from conformance.page import SIGNS, read_results
from conformance.session import Session
from conformance.subject import load_subject

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- clauses:.*?-->\n)(.*?)(<!-- /clauses -->)", re.DOTALL)


RESULTS = ("reference-0.1.0", "litgpt-0.4.12", "litgpt-0.5.13", "transformers-5.23.0", "x-transformers-2.31.10")


def clause_table() -> str:
    """The catalogue as Markdown, with what was found on the CPU."""
    files = [README.parent / "reports" / "conformance" / f"{name}-cpu.json" for name in (*RESULTS, "plain-loop-1")]
    reports = read_results(files)
    heads = "".join(f" {report.name} {report.version} |" for report in reports)
    lines = [f"| | Requirement |{heads}", f"|---|---|{':-:|' * len(reports)}"]
    for chapter, title in CHAPTERS.items():
        lines.append(f"| **{chapter}** | **{title}** |{' |' * len(reports)}")
        for clause in (clause for clause in catalogue().values() if clause.chapter == chapter):
            should = " (should)" if clause.level == "should" else ""
            cells = "".join(f" {SIGNS[report.verdict(clause).outcome]} |" for report in reports)
            lines.append(f"| {clause.id} | {clause.requirement}{should} |{cells}")
    return "\n".join(lines) + "\n"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_table_is_the_catalogue() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == clause_table(), "run: python -m tests.test_readme"


def test_own_stack_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, adapter, *_ = python_blocks()
    (tmp_path / "my_loop.py").write_text(loop, encoding="utf-8")
    (tmp_path / "my_adapter.py").write_text(adapter, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Session(load_subject("my_adapter:Mine")) as session:
        outcomes = {identity: session.judge(clause).outcome for identity, clause in catalogue().items()}
    failed = [identity for identity, outcome in outcomes.items() if outcome not in ("pass", "n/a")]
    assert failed == ["OPT-11", "CLIP-3"]
    assert list(outcomes.values()).count("pass") == 26
    adapter_lines = [line for line in adapter.splitlines() if line.strip()]
    assert len(adapter_lines) <= 16


def test_rules_alone() -> None:
    exec(compile(python_blocks()[2], "README.md", "exec"), {})


def test_reference_learns(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks()[3], "README.md", "exec"), {})
    first, last = map(float, re.findall(r"\d\.\d\d", capsys.readouterr().out))
    assert first > 5.4, "a model over 256 bytes that knows nothing loses ln 256 = 5.55 nats"
    assert last < 3.5


def main() -> int:
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda found: found[1] + clause_table() + found[3], text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
