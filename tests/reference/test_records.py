"""prepare --field: each record of JSON lines, CSV and Parquet files is a document."""

import json
import sys
from pathlib import Path

import pytest

from reference.__main__ import main
from reference.data.documents import SPLITS
from reference.errors import ConfigurationError, DataError
from tests.reference.test_prepare import prepared, read_back
from tests.sentences import sentence_of

TEXTS = [f'Story {number}, über\n"two" lines, and a comma' for number in range(60)]


def write(path: Path) -> Path:
    """The texts as records of the kind that the name tells."""
    if path.suffix == ".jsonl":
        rows = [json.dumps({"id": number, "text": text}) for number, text in enumerate(TEXTS)]
        path.write_text("\n\n".join(rows) + "\n")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            rows_of = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            rows_of.writerows([["id", "text"], *([number, text] for number, text in enumerate(TEXTS))])
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_each_record_is_a_document_of_one_split(suffix: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"stories.{suffix}")
    result = prepared([str(source)], tmp_path / "out", field="text", validation_share=0.1)
    train, validation = (read_back(tmp_path / "out", split) for split in SPLITS)
    assert sorted(train + validation) == sorted(text.encode() for text in TEXTS)
    assert not set(train) & set(validation)
    assert (result.files, result.skipped) == (60, ())
    assert "60 records" in result.describe()


def test_what_is_left_out_is_told_by_its_number(tmp_path: Path) -> None:
    source = write(tmp_path / "stories.jsonl")
    with source.open("a") as file:
        for text in (TEXTS[3], "", 7, "\ud800", "a\0b"):
            file.write(json.dumps({"text": text}) + "\n")
        file.write('{"txt": "no text"}\n')
    told = prepared([str(source)], tmp_path / "out", field="text").describe()
    assert f"left out: 1 record (copy of another), e.g. {source}:61" in told
    assert f"left out: 2 records (empty, or holds NUL bytes), e.g. {source}:62" in told
    assert f"left out: 2 records (no text in the field text), e.g. {source}:63" in told
    assert f"left out: 1 record (not UTF-8), e.g. {source}:64" in told


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.jsonl", '{"body": "x"}', "text", "no record has text in the field 'text' (their fields are: body): name"),
        ("a.jsonl", '{"text": "x"}\n[1]', "text", "line 2 of {path} is not a JSON object"),
        ("a.jsonl", '{"text": "x"}\nnot', "text", "line 2 of {path} is not JSON"),
        ("a.jsonl", "\n", "text", "there is no record in {path}: give files that hold some."),
        ("a.txt", "text", "text", "{path} is not a file of records (.jsonl, "),
        (
            "a.csv",
            'text\n"un\0closed',
            "text",
            "no record is left of 1; the first, {path}:1: empty, or holds NUL bytes.",
        ),
        ("a.jsonl", '{"text": "\\ud800"}', "text", "no record is left of 1; the first, {path}:1: not UTF-8."),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, content: str, field: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    told = sentence_of(DataError, lambda: prepared([str(path)], tmp_path / "out", field=field))
    assert told.startswith(message.format(path=path))
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_text("PAR1")
    told = sentence_of(DataError, lambda: prepared([str(path)], tmp_path / "out", field="text"))
    assert told == f"{path} is not a Parquet file, or it is damaged: get it again."


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (path := tmp_path / "a.parquet").touch()
    told = sentence_of(ConfigurationError, lambda: prepared([str(path)], tmp_path / "out", field="text"))
    assert told == f"{path} needs the package pyarrow: run pip install 'gpt-conformance[parquet]'."


def test_the_command_takes_a_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "stories.jsonl"), tmp_path / "out"
    assert main(["prepare", "--text", str(source), "--field", "text", "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(
        f"Written: {out / 'train.bin'}, and beside it train.json, validation.bin, validation.json, SHA256SUMS\n"
    )
    assert main(["prepare", "--field", "text", "--out", str(out)]) == 1 + 1
    assert "field names a part of records: give the files of records, too." in capsys.readouterr().err
