"""Token files: what is written, and that no damage goes unseen."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference.data import TokenData, sidecar, tokenfile, write_tokens
from reference.data.tokenfile import Ids, TokenWriter, publish
from reference.errors import ConfigurationError, DataError
from tests.reference.token_files import END, opened, taken, write
from tests.sentences import sentence_of

# What is written


def test_a_file_holds_the_ids_and_one_end_behind_each_document(tmp_path: Path) -> None:
    path = write(tmp_path, [[1, 2], np.array([3], np.uint8), [], range(4, 6)])
    assert np.fromfile(path, "<u2").tolist() == [1, 2, END, 3, END, END, 4, 5, END]
    data = opened(tmp_path)
    assert (data.tokens, data.documents, data.vocab_size) == (9, 4, 1000)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["SHA256SUMS", "train.bin", "train.json"]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32"), (70000, "uint32")]
)
def test_no_id_wraps_around(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    ids = [0, 1, vocab_size - 2]  # 69998 would become 4462 in 16 bits (datatrove#118)
    write(tmp_path, [ids], vocab_size=vocab_size, end=vocab_size - 1)
    data = opened(tmp_path, block_size=3, microbatch_size=1)
    assert data.sidecar.dtype == dtype
    assert taken(data, 1)[0].tolist() == [[*ids, vocab_size - 1]]
    assert taken(data, 1)[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([5, 1000], "token id 1000, but vocab_size is 1000"),
        ([-1, 5], "token id -1"),
        ([5, END], "end_of_document (999) inside"),
        ([0.5], "float64"),
        ([[1, 2]], "shape (1, 2)"),
        (b"ab", "shape ()"),
        ([True], "bool"),
    ],
)
def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, document: Any, said: str) -> None:
    message = sentence_of(DataError, lambda: write(tmp_path, [[1], document]))
    assert said in message
    assert "document 1 of train" in message
    assert list(tmp_path.iterdir()) == []


def test_a_split_without_documents_or_with_an_impossible_end_is_refused(tmp_path: Path) -> None:
    assert "at least one document" in sentence_of(DataError, lambda: write(tmp_path, []))
    assert "below vocab_size" in sentence_of(DataError, lambda: write(tmp_path, [[1]], end=1000))
    assert "at most 2**32" in sentence_of(DataError, lambda: write(tmp_path, [[1]], vocab_size=(1 << 32) + 1))
    assert list(tmp_path.iterdir()) == []


def test_documents_are_written_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenfile, "SLICE", 7)
    write(tmp_path, [np.arange(100), np.arange(50)])
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [*range(100), END, *range(50), END]
    opened(tmp_path).verify()


def test_an_interrupted_writing_leaves_the_earlier_files_as_they_were(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted() -> Iterable[Ids]:
        yield [4, 5, 6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, [[7]])
    assert opened(tmp_path).ids.tolist() == [7, END]


def test_what_a_killed_writing_left_is_removed_by_a_later_one_when_it_is_old(tmp_path: Path) -> None:
    old, new = (tmp_path / f".train.bin.{name}.partial" for name in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"half")
        assert "there is: no token file" in sentence_of(DataError, lambda: opened(tmp_path))
    os.utime(old, (0, 0))
    write(tmp_path, [[1]])
    assert not old.exists()
    assert new.exists()  # perhaps of a process that is still writing


@pytest.mark.parametrize("failing", ["train.bin", "validation.bin", "train.json", "validation.json"])
def test_splits_published_together_never_open_as_old_beside_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def both(first: int) -> None:
        with (
            TokenWriter(tmp_path, "train", vocab_size=9, tokenizer="bytes", end_of_document=8) as train,
            TokenWriter(tmp_path, "validation", vocab_size=9, tokenizer="bytes", end_of_document=8) as validation,
        ):
            for writer in (train, validation):
                writer.write([first])
                writer.end_document()
            publish([validation, train])

    both(1)
    rename = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if target.name == failing:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stopped)
        assert "No space left on device" in sentence_of(DataError, lambda: both(2))
    found = []
    for split in ("train", "validation"):
        try:
            found.append(int(opened(tmp_path, split=split).ids[0]))
        except DataError as error:
            assert "prepare" in str(error)  # noqa: PT017 # either outcome is right, this is what it says
    assert found in ([], [2])  # and if one opens it is the validation split: training begins with neither
    assert not (tmp_path / "train.json").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in sentence_of(DataError, lambda: write(tmp_path, [[1]]))
    assert list(tmp_path.iterdir()) == []


# What is opened


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HARM: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shortened": (lambda folder: truncate(folder / "train.bin", 100), "has 100 bytes, but train.json says 222"),
    "shortened by half a token": (lambda folder: truncate(folder / "train.bin", 221), "truncated or from elsewhere"),
    "lengthened": (lambda folder: truncate(folder / "train.bin", 224), "truncated or from elsewhere"),
    "emptied": (lambda folder: truncate(folder / "train.bin", 0), "truncated or from elsewhere"),
    "a flipped bit": (lambda folder: flip(folder / "train.bin", 100), "its content differs"),
    "no token file": (lambda folder: (folder / "train.bin").unlink(), "No such file"),
    "no sidecar": (lambda folder: (folder / "train.json").unlink(), "no train.json beside it"),
    "half a sidecar": (lambda folder: truncate(folder / "train.json", 99), "does not describe a token file"),
    "a list": (lambda folder: (folder / "train.json").write_text("[]"), "does not describe a token file"),
    "binary": (lambda folder: (folder / "train.json").write_bytes(b"\xff"), "does not describe a token file"),
    "foreign": (lambda folder: (folder / "train.json").write_text('{"a": 1}'), "does not describe a token file"),
    "another version": (lambda folder: edit(folder, format="reference tokens 4"), "format 'reference tokens 4'"),
    "an edited field": (lambda folder: edit(folder, vocab_size=70000), "was changed since it was written"),
    "no checksums": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS is missing, or has no checksum of"),
    "another field": (lambda folder: edit(folder, more=1), "was changed since it was written"),
}


@pytest.mark.parametrize("what", HARM)
def test_damage_is_one_sentence_at_the_opening(tmp_path: Path, what: str) -> None:
    harm, said = HARM[what]
    write(tmp_path, [list(range(110))])
    harm(tmp_path)
    message = sentence_of(DataError, lambda: opened(tmp_path))
    assert said in message
    assert str(tmp_path) in message


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path, [[1, 2]], split=split)
    names = ["train.bin", "train.json", "validation.bin", "validation.json"]
    expected = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}" for name in names]
    assert sorted((tmp_path / "SHA256SUMS").read_text().splitlines()) == sorted(expected)


def as_the_first_release(folder: Path) -> None:
    """Turn a split into the files that 0.1.0 wrote: BLAKE2b, a checksum of the sidecar in itself, no SHA256SUMS."""

    def blake(content: bytes) -> str:
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    plain, tokens = json.loads((folder / "train.json").read_text()), (folder / "train.bin").read_bytes()
    plain |= {"format": "reference tokens 1", "checksum": blake(tokens), "sampled_checksum": blake(tokens)}
    if plain["tokenizer_checksum"] is not None:
        plain["tokenizer_checksum"] = blake((folder / "tokenizer.json").read_bytes())
    plain["sidecar_checksum"] = blake(json.dumps(plain).encode())
    (folder / "train.json").write_text(json.dumps(plain, indent=2) + "\n")
    (folder / "SHA256SUMS").unlink()


def test_files_of_the_first_release_are_read_and_checked(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("one")
    write_tokens(tmp_path, "train", [[1, 2, 3]], vocab_size=9, tokenizer="tokenizer.json", end_of_document=8)
    as_the_first_release(tmp_path)
    data = opened(tmp_path)
    assert data.ids.tolist() == [1, 2, 3, 8]
    data.verify()
    flip(tmp_path / "train.bin", 2)
    assert "its content differs" in sentence_of(DataError, lambda: opened(tmp_path))
    flip(tmp_path / "train.bin", 2)
    (tmp_path / "tokenizer.json").write_text("two")
    assert "not the tokenizer that train.bin" in sentence_of(DataError, lambda: opened(tmp_path))
    (tmp_path / "tokenizer.json").write_text("one")
    edit(tmp_path, vocab_size=70000)
    assert "was changed since it was written" in sentence_of(DataError, lambda: opened(tmp_path))


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert "there is no folder" in sentence_of(DataError, lambda: opened(tmp_path / "absent"))
    write(tmp_path, [[1]], split="train")
    assert "there is: train" in sentence_of(DataError, lambda: opened(tmp_path, split="validation"))


def test_a_large_file_is_sampled_at_the_opening_and_read_whole_to_verify(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    write(tmp_path, [generator.integers(0, 999, 400_000)])  # 800 kB
    path = tmp_path / "train.bin"
    flip(path, 100_000)  # between two of the blocks
    data = opened(tmp_path)
    assert "checksum differs" in sentence_of(DataError, data.verify)
    flip(path, 100_000)
    opened(tmp_path).verify()
    for position in (0, 4095, path.stat().st_size - 1):
        flip(path, position)
        assert "its content differs" in sentence_of(DataError, lambda: opened(tmp_path))
        flip(path, position)
    other = tmp_path / "other"
    write(other, [generator.integers(0, 999, 400_000)])
    (other / "train.bin").replace(path)
    assert "its content differs" in sentence_of(DataError, lambda: opened(tmp_path))  # the same size, another content


def test_tokens_are_bound_to_the_tokenizer_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("one")
    write_tokens(tmp_path, "train", [[1]], vocab_size=9, tokenizer="tokenizer.json", end_of_document=8)
    assert opened(tmp_path).tokenizer_file == file
    file.write_text("two")
    assert "not the tokenizer that train.bin was written with" in sentence_of(DataError, lambda: opened(tmp_path))
    file.unlink()
    assert "tokenizer.json cannot be read" in sentence_of(DataError, lambda: opened(tmp_path))
    write(tmp_path / "bytes", [[1]])
    assert opened(tmp_path / "bytes").tokenizer_file is None


@pytest.mark.parametrize(("block_size", "microbatch_size"), [(0, 1), (1, 0)])
def test_sizes_are_positive(tmp_path: Path, block_size: int, microbatch_size: int) -> None:
    write(tmp_path, [[1, 2, 3]])
    assert "must be at least 1" in sentence_of(
        ConfigurationError, lambda: opened(tmp_path, block_size, microbatch_size)
    )


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_flipped_bit_that_opening_does_not_see_is_one_sentence(tmp_path: Path, dtype: str) -> None:
    size = 300 if dtype == "uint16" else 70_000
    rng = np.random.default_rng(1)
    write(tmp_path, [rng.integers(0, 299, size=400_000)], vocab_size=size, end=size - 1)
    path = tmp_path / "train.bin"
    content = np.fromfile(path, dtype)
    place = sidecar.BLOCK * 2 // content.itemsize  # between two of the blocks that opening looks at
    content[place] |= 1 << (content.itemsize * 8 - 1)
    content.tofile(path)
    data = opened(tmp_path, block_size=100, microbatch_size=64)
    told = f"{path} is damaged: it holds the token id {content[place]}, but the vocabulary that train.json states has"
    assert sentence_of(DataError, lambda: taken(data, data.sequences // 64 + 1)).startswith(told)
    assert sentence_of(DataError, lambda: list(data.once())).startswith(told)


@pytest.mark.parametrize("name", ["train.json", "validation.json", "SHA256SUMS"])
def test_a_disk_that_is_full_at_the_last_moment_has_changed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def writers(ids: list[int]) -> None:
        with contextlib.ExitStack() as stack:
            made = []
            for split in ("validation", "train"):
                about: dict[str, Any] = {"vocab_size": 1000, "tokenizer": "bytes", "end_of_document": END}
                writer = stack.enter_context(TokenWriter(tmp_path, split, **about))
                writer.write(ids)
                writer.end_document()
                made.append(writer)
            publish(made)

    def full(path: Path, content: bytes) -> int:
        if name in path.name:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    writers([1, 2, 3])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_bytes = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "(No space left on device): make room" in sentence_of(DataError, lambda: writers([4, 5, 6]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("left", [0, 3, 6])
def test_a_file_that_was_cut_short_since_is_told(left: int, tmp_path: Path) -> None:
    write_tokens(tmp_path, "train", [[1, 2, 3, 4]], vocab_size=8, tokenizer="bytes", end_of_document=5)
    data = TokenData(tmp_path, "train", block_size=2, microbatch_size=1, seed=0)
    assert len(list(data.once())) == 2
    os.truncate(tmp_path / "train.bin", left)
    message = sentence_of(DataError, lambda: list(data.once()))
    assert f"was changed while it was in use: it has {left} bytes now, and had 10." in message
