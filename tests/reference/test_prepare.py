"""From text to token files: every byte is in one split, or in the list of what was left out."""

import codecs
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reference import heartbeat
from reference.data import documents, encode
from reference.data import prepare as prepare_module
from reference.data.documents import SPLITS
from reference.data.encode import pieces
from reference.data.prepare import Prepared, prepare, prepare_default
from reference.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from reference.data.tokens import TokenData
from reference.errors import ConfigurationError, DataError
from tests.sentences import sentence_of


def texts(folder: Path, number: int = 200) -> Path:
    """Many short files of similar size."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        (folder / f"{index}.txt").write_text(f"file {index} says naïve things\n" * 3, encoding="utf-8")
    return folder


def prepared(text: Path | list[str], out: Path, tokenizer: str = "bytes", **more: Any) -> Prepared:
    return prepare([str(text)] if isinstance(text, Path) else text, tokenizer, out, progress=False, **more)


def opened(out: Path, split: str) -> TokenData:
    return TokenData(out, split, block_size=4, microbatch_size=1, seed=0)


def read_back(out: Path, split: str) -> list[bytes]:
    """The split's documents as bytes; the last one also where it does not end."""
    data = opened(out, split)
    tokenizer = load_tokenizer(out)
    ends = np.flatnonzero(data.ids == tokenizer.end_of_document)
    parts = np.split(data.ids, ends + 1)
    found = [
        tokenizer.decode([token for token in part.tolist() if token != tokenizer.end_of_document]) for part in parts
    ]
    assert len(ends) == data.documents
    return [text.encode() for text in found[: len(ends)] + ([found[-1]] if len(parts[-1]) else [])]


def test_every_file_is_one_document_of_one_split(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts")
    result = prepared(source, tmp_path / "out")
    contents = sorted(path.read_bytes() for path in source.iterdir())
    train, validation = (read_back(tmp_path / "out", split) for split in SPLITS)
    assert sorted(train + validation) == contents
    assert not set(train) & set(validation)
    assert 1 <= len(validation) <= 30  # 5 % of 200
    assert (result.files, result.size, result.divided) == (200, sum(map(len, contents)), "by file")
    assert result.documents == {"train": len(train), "validation": len(validation)}
    assert sum(result.tokens.values()) == result.size + 200
    assert result.skipped == ()
    names = {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"SHA256SUMS"}


def test_more_files_and_other_names_move_no_file(tmp_path: Path) -> None:
    prepared(texts(tmp_path / "texts"), tmp_path / "one")
    prepared(texts(tmp_path / "renamed" / "elsewhere", 260), tmp_path / "two")
    for split in SPLITS:
        assert set(read_back(tmp_path / "one", split)) < set(read_back(tmp_path / "two", split))


def test_another_seed_makes_another_split_and_the_same_one_the_same_files(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepared(source, tmp_path / name, seed=seed)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert set(read_back(tmp_path / "a", "validation")) != set(read_back(tmp_path / "c", "validation"))


def test_what_cannot_be_used_is_left_out_and_said(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts")
    (source / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (source / "half.txt").write_bytes("naï".encode()[:-1])
    (source / "zeros.bin").write_bytes(b"a\0b")
    (source / "empty.txt").touch()
    (source / "copy.txt").write_bytes((source / "0.txt").read_bytes())
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("hidden")
    (source / ".hidden").write_text("hidden")
    (source / "absent.txt").symlink_to(source / "nowhere")
    result = prepared(source, tmp_path / "out")
    assert {path.name: reason for path, reason in result.skipped if path.name != "0.txt"} | {"copy.txt": ""} == {
        "latin.txt": "not UTF-8",
        "half.txt": "not UTF-8",
        "zeros.bin": "binary: holds NUL bytes",
        "empty.txt": "empty",
        "copy.txt": "",
    }
    assert sum(reason == "copy of another" for _, reason in result.skipped) == 1
    assert result.files == 200
    said = result.describe()
    assert "left out: 2 files (not UTF-8), e.g. " in said
    assert "left out: 1 file (empty), e.g. " in said
    assert "200 text files" in said


def test_records_are_read_as_text_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("plain text\n" * 50)
    prepare([str(text)], "bytes", tmp_path / "plain", progress=False)
    assert not caplog.records
    (text / "b.JSONL").write_text('{"text": "a record"}\n' * 50)
    prepare([str(text)], "bytes", tmp_path / "records", progress=False)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"1 of 2 files hold records rather than text ({text / 'b.JSONL'}): ")


def test_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    content = "mark\r\nline\ufeff\r\n\n naïve 🙂 <|endoftext|> \x0c".encode()
    (tmp_path / "a.txt").write_bytes(content * 40)
    for tokenizer in ("bytes", "bpe:300"):
        out = tmp_path / tokenizer[:3]
        prepared(tmp_path / "a.txt", out, tokenizer)
        assert b"".join(read_back(out, "train") + read_back(out, "validation")) == content * 40


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
def test_a_single_file_is_split_by_position_without_a_false_end(tmp_path: Path, tokenizer: str) -> None:
    lines = "".join(f"line {number} of naïve text\n" for number in range(1000))
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    result = prepared(tmp_path / "a.txt", tmp_path / "out", tokenizer, validation_share=0.1)
    (train,), (validation,) = (read_back(tmp_path / "out", split) for split in SPLITS)
    assert (train + validation).decode() == lines
    assert train.endswith(b"\n")
    assert len(validation) / len(lines.encode()) == pytest.approx(0.1, abs=0.001)
    assert result.divided == "by position"
    assert result.documents == {"train": 0, "validation": 1}  # the text was cut, it does not end there


def test_one_large_file_among_small_ones_is_cut_rather_than_lost_to_one_split(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", 3)
    (source / "large.txt").write_text("".join(f"line {number}\n" for number in range(5000)))
    prepared(source, tmp_path / "out")
    sizes = [sum(map(len, read_back(tmp_path / "out", split))) for split in SPLITS]
    assert sizes[1] / sum(sizes) == pytest.approx(0.05, abs=0.001)
    cut = [b"".join(read_back(tmp_path / "out", split)) for split in SPLITS]
    assert sorted(b"".join(cut)) == sorted(b"".join(path.read_bytes() for path in source.iterdir()))
    assert sum(opened(tmp_path / "out", split).documents for split in SPLITS) == 4


def test_a_text_without_lines_is_cut_between_characters(tmp_path: Path) -> None:
    for count in range(2, 30):
        (tmp_path / "a.txt").write_text("🙂" * count, encoding="utf-8")
        prepared(tmp_path / "a.txt", tmp_path / "out", validation_share=0.4)
        (train,), (validation,) = (read_back(tmp_path / "out", split) for split in SPLITS)
        assert (train + validation).decode() == "🙂" * count


def test_too_little_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("🙂", encoding="utf-8")
    assert "too few for a training and a validation split" in sentence_of(
        DataError, lambda: prepared(tmp_path / "a.txt", tmp_path / "out")
    )
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert "no text file is left of 1 (1 not UTF-8)" in sentence_of(
        DataError, lambda: prepared(tmp_path / "a.txt", tmp_path / "out")
    )
    (tmp_path / "none").mkdir()
    assert "no text file is left of 0" in sentence_of(DataError, lambda: prepared(tmp_path / "none", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", 20)
    names = [str(source / "1*.txt"), str(source / "1.txt"), str(source / "2.txt")]
    result = prepared(names, tmp_path / "out", validation_share=0.3)
    assert result.files == 12  # 1, 10 to 19, 2: each once
    assert prepared(source, tmp_path / "out", validation_share=0.3).files == 20
    odd = tmp_path / "[odd].txt"
    odd.write_text("one\ntwo\nthree\n" * 9)
    assert prepared(odd, tmp_path / "out").files == 1
    assert "there is no text at" in sentence_of(DataError, lambda: prepared([str(source / "*.md")], tmp_path / "out"))
    assert "there is no text at '':" in sentence_of(DataError, lambda: prepared([""], tmp_path / "out"))


def test_the_data_folder_may_lie_within_the_text(tmp_path: Path) -> None:
    source = texts(tmp_path, 60)
    for _ in range(2):
        result = prepared(source, tmp_path / "out", "bpe:260")
        assert (result.files, result.skipped) == (60, ())
    assert prepared(source / "1.txt", tmp_path).files == 1  # and the text within the data folder


def test_byte_pairs_are_trained_on_the_training_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = texts(tmp_path / "texts")
    seen: list[str] = []

    def trained(chunks: Any, size: int) -> FileTokenizer:
        seen.extend(chunks)
        return train_tokenizer(seen, size)

    monkeypatch.setattr(prepare_module, "train_tokenizer", trained)
    result = prepared(source, tmp_path / "out", "bpe:300")
    assert sorted(text.encode() for text in seen) == sorted(read_back(tmp_path / "out", "train"))
    assert result.vocab_size == opened(tmp_path / "out", "train").vocab_size == 300
    assert opened(tmp_path / "out", "train").tokenizer_file == tmp_path / "out" / "tokenizer.json"
    assert read_back(tmp_path / "out", "validation")


def test_a_saved_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["file of naïve things"] * 9, 270)
    (tmp_path / "saved.json").write_bytes(tokenizer.content)
    prepared(texts(tmp_path / "texts"), tmp_path / "out", str(tmp_path / "saved.json"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.content
    assert opened(tmp_path / "out", "validation").vocab_size == 270


def test_data_of_another_tokenizer_is_kept_unless_told(tmp_path: Path) -> None:
    source, out = texts(tmp_path / "texts"), tmp_path / "out"
    prepared(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "holds data of another tokenizer (bytes)" in sentence_of(
        ConfigurationError, lambda: prepared(source, out, "bpe:260")
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepared(source, out, "bpe:260", overwrite=True)
    assert load_tokenizer(out).vocab_size == 260
    prepared(source, out, "bpe:260")  # the same tokenizer again
    for spec in ("bytes", "bpe:270"):
        assert "(tokenizer.json)" in sentence_of(ConfigurationError, partial(prepared, source, out, spec))
    prepared(source, out, overwrite=True)
    assert load_tokenizer(out).name == "bytes"


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = texts(tmp_path / "texts"), tmp_path / "out"
    write = encode.write

    def interrupted(writer: Any, *more: Any) -> None:
        write(writer, *more)
        if writer.split == "validation":
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(source, out, "bpe:260")
    assert list(out.iterdir()) == []


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = texts(tmp_path / "texts")
    divide = documents.divide

    def changed(found: list[documents.Document], share: float, whole: bool) -> Any:
        found[0].path.write_text("short")
        return divide(found, share, whole)

    monkeypatch.setattr(prepare_module, "divide", changed)
    assert "became shorter while it was read" in sentence_of(DataError, lambda: prepared(source, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("spec", ["bpe:", "bpe:x", "bpe:-5", "bpe:256", "bpe:1.5", "absent.json", "byte"])
def test_tokenizers_that_are_none(tmp_path: Path, spec: str) -> None:
    sentence_of(ConfigurationError, lambda: prepared(texts(tmp_path / "texts", 2), tmp_path / "out", spec))
    assert not (tmp_path / "out").exists()


def test_other_settings_that_cannot_work(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", 2)
    for share in (0.0, 1.0, -1.0, float("nan")):
        sentence_of(ConfigurationError, partial(prepared, source, tmp_path / "out", validation_share=share))
    sentence_of(ConfigurationError, lambda: prepared(source, source / "1.txt"))
    sentence_of(DataError, lambda: prepared(source, source / "1.txt" / "out"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts")
    for index in range(150):
        path = source / f"{index}.txt"
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    (source / "without.txt").write_bytes((source / "0.txt").read_bytes()[3:])
    (source / "bare.txt").write_bytes(codecs.BOM_UTF8)
    result = prepared(source, tmp_path / "marked")
    assert sorted(reason for _, reason in result.skipped) == ["copy of another", "empty"]
    prepared(texts(tmp_path / "plain"), tmp_path / "same")
    for split in SPLITS:
        assert read_back(tmp_path / "marked", split) == read_back(tmp_path / "same", split)


def test_a_single_file_with_a_mark_is_cut_without_it(tmp_path: Path) -> None:
    for count in range(2, 12):
        (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + "🙂".encode() * count)
        prepared(tmp_path / "a.txt", tmp_path / "out", validation_share=0.4)
        (train,), (validation,) = (read_back(tmp_path / "out", split) for split in SPLITS)
        assert (train + validation).decode() == "🙂" * count


# Long documents


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_a_long_text_is_encoded_in_pieces_as_if_whole(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    text = "".join(f"def name_{number}(x):\n    return  x\n\n\n" + " " * (number % 7) for number in range(2000))
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else train_tokenizer([text], 400)
    monkeypatch.setattr(encode, "PIECE", 3000)
    chunks = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    found = list(pieces(chunks, tokenizer))
    assert len(found) > len(text) / 5000
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert "".join(piece for piece, _ in found) == text
    assert [token for piece, _ in found for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_tokenizer_that_permits_no_cut_gets_the_text_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Beginning(ByteTokenizer):
        """Begins every text with a mark, as tokenizers that add a space do."""

        def encode(self, text: str) -> list[int]:
            return [32, *super().encode(text)]

    monkeypatch.setattr(encode, "PIECE", 3000)
    text = "some lines\n" * 5000
    assert list(pieces([text[:20_000], text[20_000:]], Beginning())) == [(text, True)]


def test_long_files_are_read_in_chunks_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"naïve line {number} 🙂\n" for number in range(3000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepared(tmp_path / "a.txt", tmp_path / "whole", "bpe:300")
    monkeypatch.setattr(documents, "CHUNK", 1001)  # within characters, too
    monkeypatch.setattr(encode, "PIECE", 3000)
    monkeypatch.setattr(encode, "BATCH", 5000)
    saved = str(tmp_path / "whole" / "tokenizer.json")
    prepared(tmp_path / "a.txt", tmp_path / "pieces", saved)
    for name in ("train.bin", "validation.bin"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# The standard library


def test_the_standard_library_is_text_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A tenth of it: all of it takes a second.
    caplog.set_level("INFO")
    monkeypatch.setattr(heartbeat, "EVERY", 0.002)
    every = documents.standard_library()
    assert len(every) > 300
    assert not any(re.search("/(test|tests|site-packages)/", path.as_posix()) for path in every)
    assert all(path.suffix == ".py" for path in every)
    monkeypatch.setattr(prepare_module, "standard_library", lambda: every[::10])
    result = prepare_default(tmp_path / "out")
    assert result is not None
    assert result.files > 30
    assert opened(tmp_path / "out", "train").tokens == result.tokens["train"] > 100_000
    assert any(line.startswith("prepare: encoding, train") for line in caplog.messages)  # the progress
    before = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    assert prepare_default(tmp_path / "out") is None  # it is there
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == before
    (tmp_path / "out" / "train.bin").write_bytes(b"x")
    assert "truncated or from elsewhere" in sentence_of(DataError, lambda: prepare_default(tmp_path / "out"))


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert "give files with --text" in sentence_of(DataError, lambda: prepared([], tmp_path / "out"))
