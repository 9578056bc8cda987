"""The README tells the truth: its Python runs as it stands, its tables are the catalogue and what was measured.

``python -m tests.test_readme`` writes the tables.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.bench.__main__ import collect
from conformance.clause import CHAPTERS, catalogue
from conformance.report.page import SIGNS, read_results
from conformance.session import Session
from conformance.subject import load_subject

README = Path(__file__).parent.parent / "README.md"
CARD = "nvidia-h100-80gb-hbm3"
Row = dict[str, Any]
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


def bench_rows(group: str, size: str) -> dict[str, Row]:
    """The rows of the committed runs on a GPU, by name: the whole run, and the optimizers that were measured again."""
    folder, found = README.parent / "reports" / "bench" / CARD, {}
    for name in ("summary.json", "optimizers/summary.json"):
        summary = json.loads((folder / name).read_text(encoding="utf-8"))
        assert summary["complete"]
        assert not summary["label"]
        rows = [row for row in summary["rows"] if (row["group"], row["size"]) == (group, size)]
        assert not any(row["unavailable"] for row in rows)
        found.update({row["name"]: row for row in rows})
    return found


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def optimizer_table() -> str:
    """Each optimizer's step for each size and dtype: device time, its share of the floor, wall time."""
    sizes = ("gpt2-124m", "llama-1.2b")
    lines = ["| | 124M | of the floor | wall | 1.3B | of the floor | wall |", f"|---|{'--:|' * 6}"]
    rows = {size: bench_rows("optimizer step", size) for size in sizes}
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        lines.append(f"| **{dtype}** |{' |' * 6}")
        for name in rows[sizes[0]]:
            if not name.endswith(f", {short}"):
                continue
            cells = []
            for row in (rows[size][name] for size in sizes):
                mark = " *" if row["waits_for_host"] else ""
                cells += [f"{figure(row['device_ms']['median'])} ms{mark}", f"{row['share_of_floor']:.1%}"]
                cells.append(f"{figure(row['wall_ms']['median'])} ms")
            lines.append(f"| {name.removesuffix(f', {short}')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def training_table() -> str:
    """Training steps of the reference and of other libraries."""
    lines = ["| | step | tokens/s | MFU | causal | memory | beside its baseline |", f"|---|{'--:|' * 6}"]
    for title, size in (("GPT-2 124M", "gpt2-124m"), ("Llama 1.3B", "llama-1.2b")):
        lines.append(f"| **{title}** |{' |' * 6}")
        rows = bench_rows("training step", size)
        for name, row in sorted(rows.items(), key=lambda item: not item[0].startswith("reference")):
            beside = f"{row['interleaved']['ratio']:.3f}" if row["interleaved"] else ""
            lines.append(
                f"| {name.removesuffix(', compiled')} | {row['wall_ms']['median']:.1f} ms "
                f"| {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {row['mfu_causal']:.1%} "
                f"| {row['peak_allocated'] / 1e9:.1f} GB | {beside} |"
            )
    return "\n".join(lines) + "\n"


def trainer_table() -> str:
    """Whole runs of ``Trainer.fit`` on a GPU."""
    runs = json.loads((README.parent / "reports" / "trainer-h100.json").read_text(encoding="utf-8"))["runs"]
    lines = ["| | microbatches | tokens/s | MFU | memory | the GPU waits for the host |", "|---|--:|--:|--:|--:|--:|"]
    for name, run in runs.items():
        settings = run["settings"]
        lines.append(
            f"| {name} | {settings['microbatches']} x {settings['microbatch']} | {run['tokens_per_second']:,} "
            f"| {run['mfu']:.1%} | {run['peak_gigabytes']:.1f} GB "
            f"| {run['share_of_time_the_gpu_waits_for_the_host']:.2%} of the time |"
        )
    return "\n".join(lines) + "\n"


def command_table() -> str:
    """What the commands take on a CPU."""
    seconds = json.loads((README.parent / "reports" / "commands-cpu.json").read_text(encoding="utf-8"))["seconds"]
    lines = ["| command | wall time |", "|---|--:|"]
    lines += [f"| `{name}` | {taken:,.0f} s |" for name, taken in seconds.items()]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "clauses": clause_table,
    "commands": command_table,
    "trainer": trainer_table,
    "optimizer step": optimizer_table,
    "training step": training_table,
}


def table_in(text: str, name: str) -> re.Match[str]:
    """The place of a table in the README: the comment before it, the table, the comment behind it."""
    found = re.search(rf"(<!-- {name}:.*?-->\n)(.*?)(<!-- /{name} -->)", text, re.DOTALL)
    assert found is not None
    return found


def test_the_committed_run_has_every_row_of_the_bench() -> None:
    cases = collect(torch.device("cuda"), quick=False)
    keys = {(case.group, case.size) for case in cases}
    assert {(*key, name) for key in keys for name in bench_rows(*key)} >= {case.key for case in cases}


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_was_measured(name: str) -> None:
    assert table_in(README.read_text(encoding="utf-8"), name)[2] == TABLES[name](), "run: python -m tests.test_readme"


def test_own_stack_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, adapter, *_ = python_blocks()
    (tmp_path / "my_loop.py").write_text(loop, encoding="utf-8")
    (tmp_path / "my_adapter.py").write_text(adapter, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Session(load_subject("my_adapter:Mine")) as session:
        outcomes = {identity: session.judge(clause).outcome for identity, clause in catalogue().items()}
    failed = [identity for identity, outcome in outcomes.items() if outcome not in ("pass", "n/a")]
    assert failed == ["OPT-11", "CLIP-3", "CAUSAL-3"]
    assert list(outcomes.values()).count("pass") == 28
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
    for name, table in TABLES.items():
        found = table_in(text, name)
        text = text[: found.start(2)] + table() + text[found.end(2) :]
    README.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
