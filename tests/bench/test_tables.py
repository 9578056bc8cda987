"""Tables in Markdown, and the columns that all tables share."""

from dataclasses import replace

import pytest

from conformance.bench.columns import COLUMNS, columns_of, figure
from conformance.bench.summary import grouped
from conformance.bench.tables import tables
from tests.bench.made_up import optimizer, summary


def test_there_is_a_table_for_each_group_with_every_row() -> None:
    found = tables(summary())
    assert list(found) == ["optimizer step", "training step"]
    lines = found["optimizer step"].splitlines()
    assert lines[0] == "| | device ms | of floor | wall ms | state B/param | peak GB | ratio |"
    assert lines[2].startswith("| **gpt2-124m**, 124.5 million parameters |")
    assert any(line.startswith("| **llama-1.2b**, 1.34 billion parameters |") for line in lines)
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {8}
    assert sum(line.startswith("| AdamW fused, fp32 |") for line in table) == 2
    assert "against itself" not in found["optimizer step"]
    [waiting] = [line for line in table if "AdamW8bit" in line]
    assert r"% \* |" in waiting
    assert "| reference, bf16-mixed, AdamW8bit, compiled | 84" in found["training step"]


def test_notes_say_what_the_cells_cannot_hold() -> None:
    found = tables(summary())
    for note in (
        r"- gpt2-124m: \* The GPU waits for the host during the step",
        "- gpt2-124m: torchao AdamW8bit, fp32 was not measured: torchao cannot be imported",
        "- gpt2-124m: GrokAdamW, fp32: moments travel to the CPU.",
        "- Floor of 28 bytes per parameter: read p4 g4 m4 v4, write p4 m4 v4.",
    ):
        assert note in found["optimizer step"], found["optimizer step"]
    assert "weight decay of 68.2% of the parameters." in found["training step"]


def test_no_name_breaks_a_table() -> None:
    strange = replace(summary(), rows=(replace(optimizer("A", 1e-3), name="A | <b> [x](y) `z` *"),))
    [line] = [line for line in tables(strange)["optimizer step"].splitlines() if line.startswith("| A")]
    assert line.startswith(r"| A \| \<b\> \[x\](y) \`z\` \* |")


def test_a_summary_without_rows_has_no_tables() -> None:
    assert tables(replace(summary(), rows=())) == {}


def test_a_column_that_is_empty_everywhere_is_left_out() -> None:
    parts = grouped(summary().measured)
    heads = [column.head for column in columns_of(parts["optimizer step", "gpt2-124m"])]
    assert "MFU" not in heads
    assert "of floor" in heads
    assert all(column.about.endswith(".") for column in COLUMNS.values())


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (12734.4, "12,734"), (699.21, "699.2"), (1.3382, "1.338"), (0.00912, "0.00912")]
)
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_rows_of_one_size_stand_together() -> None:
    assert list(grouped(summary().rows)) == [
        ("optimizer step", "gpt2-124m"),
        ("optimizer step", "llama-1.2b"),
        ("training step", "gpt2-124m"),
        ("training step", "llama-1.2b"),
    ]
