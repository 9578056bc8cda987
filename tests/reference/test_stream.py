"""Text files that grow while a run reads them: the same batches whenever the text came, and an exact resume."""

import itertools
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reference import GPTConfig, TrainConfig, Trainer
from reference.__main__ import main
from reference.data.prepare import prepare
from reference.data.stream import TextStream
from reference.errors import ConfigurationError, DataError
from tests.sentences import sentence_of

LINES = [f"line {number} of a log, über alles\n" for number in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("".join(LINES[::-1]), encoding="utf-8")
    prepare([str(tmp_path / "text.txt")], "bytes", tmp_path / "data", progress=False)
    (tmp_path / "logs").mkdir()
    return tmp_path


def opened(folder: Path) -> TextStream:
    return TextStream(folder / "logs", folder / "data", block_size=16, microbatch_size=2)


def grows(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Do one thing after the other where the stream waits for text."""
    following = iter(steps)
    monkeypatch.setattr("reference.data.stream.time.sleep", lambda _: next(following)())


def written(folder: Path, name: str, lines: list[str], mode: str = "a") -> None:
    with (folder / "logs" / name).open(mode, encoding="utf-8", newline="") as file:
        file.write("".join(lines))


def test_batches_do_not_depend_on_when_the_text_came(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(data, "a.txt", LINES[:20])
    written(data, "b.txt", LINES[20:])
    whole = list(itertools.islice(opened(data).batches_from(0), 30))
    ids = [*"".join(LINES[:20]).encode(), 256, *"".join(LINES[20:]).encode()]
    assert [token for batch in whole for row in batch for token in row[:-1].tolist()] == ids[: 30 * 32]
    assert all(torch.equal(batch[0, -1], batch[1, 0]) for batch in whole)

    written(data, "a.txt", LINES[:7], "w")
    (data / "logs" / "b.txt").unlink()
    grows(
        monkeypatch,
        lambda: written(data, "a.txt", [*LINES[7:19], LINES[19][:5]]),
        lambda: written(data, "a.txt", [LINES[19][5:]]),
        lambda: written(data, "b.txt", LINES[20:]),
    )
    batches = opened(data)
    assert all(map(torch.equal, itertools.islice(batches.batches_from(0), 30), whole))
    assert all(map(torch.equal, itertools.islice(batches.batches_from(11), 19), whole[11:]))


def test_a_run_resumes_exactly_and_stops_while_it_waits(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape = GPTConfig.tiny(vocab_size=257, block_size=16)
    config = TrainConfig(updates=8, warmup=2, microbatches=2, evaluate_every=None, save_every=8)
    written(data, "a.txt", LINES)
    whole = Trainer(shape, config, data / "whole").fit(opened(data)).records

    written(data, "a.txt", LINES[:14], "w")  # enough for six updates
    grows(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with caplog.at_level(logging.INFO, "reference"):
        first = Trainer(shape, config, data / "parts").fit(opened(data))
    assert "waiting for more text in" in caplog.text
    assert first.stopped == signal.SIGTERM
    assert 0 < len(first.records) < 8
    written(data, "a.txt", LINES[14:])
    rest = Trainer(shape, config, data / "parts").fit(opened(data), resume=True)
    assert [*first.records, *rest.records] == whole


def test_the_command_line_trains_on_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    written(data, "a.txt", LINES)
    words = "train --data data --data.stream logs --updates 3 --block_size 16 --directory out --evaluate_every 3"
    assert main(words.split()) == 0
    assert "text that grows in logs" in capsys.readouterr().err
    assert (data / "out" / "step-00000003").is_dir()


def test_mistakes_are_one_sentence(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(data, "b.txt", LINES)
    batches = opened(data)
    assert "by one process" in sentence_of(ConfigurationError, lambda: batches.batches_from(0, 0, 2))
    for spoil, words in (
        (lambda: written(data, "a.txt", LINES), "has come after"),
        (lambda: written(data, "b.txt", LINES[:1], "w"), "became shorter"),
        (lambda: (data / "logs" / "b.txt").unlink(), "is gone"),
        (lambda: (data / "logs" / "b.txt").write_bytes(b"x" * 3000 + b"\xff\n"), "is not UTF-8"),
    ):
        written(data, "b.txt", LINES, "w")
        grows(monkeypatch, spoil)
        assert words in sentence_of(DataError, lambda: list(opened(data).batches_from(0)))
        (data / "logs" / "a.txt").unlink(missing_ok=True)
    assert "there is no folder" in sentence_of(
        DataError, lambda: TextStream(data / "gone", data / "data", block_size=4, microbatch_size=1)
    )
