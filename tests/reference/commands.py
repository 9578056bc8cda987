"""python -m reference for tests: a small run, and what a mistake prints."""

from pathlib import Path

import pytest

from reference.__main__ import main
from reference.data import write_tokens

SMALL = [
    *("--model.n_layer=1", "--model.n_embd=16", "--model.n_head=2", "--model.block_size=16"),
    "--data.microbatch_size=2",
]
SHORT = ["--train.updates=4", "--train.warmup=1", "--train.evaluate_every=2", "--train.evaluate_batches=null"]
TEXT = b"def add(a, b):\n    return a + b\n" * 10


def write_data(folder: Path, vocab_size: int = 257) -> Path:
    for split in ("train", "validation"):
        documents = [list(TEXT), list(TEXT[::-1])]
        write_tokens(folder, split, documents, vocab_size=vocab_size, tokenizer="bytes", end_of_document=256)
    return folder


def train(data: str, *more: str) -> int:
    return main(["train", "--data.path", data, *SMALL, *SHORT, "--train.save_every", "2", *more])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on stderr: a single line that begins with ``error: ``, without it."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")
