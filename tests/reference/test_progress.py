"""What a run shows and writes while it runs."""

import contextlib
import csv
import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from reference.cli.loggers import csv_metrics, metrics_file, read_rows, tensorboard
from reference.cli.progress import live_line, logging_to
from reference.config import GPTConfig, TrainConfig
from reference.errors import ConfigurationError
from reference.model.gpt import GPT
from reference.training.run import Run
from reference.training.throughput import flops_per_token
from reference.training.trainer import Record, log, utilisation


def record(update: int, **changes: Any) -> Record:
    given = {"loss": 5.0 / update, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens": 100, "seconds": 0.5}
    return Record(update=update, **(given | changes))


def run_of(updates: int, **changes: Any) -> Run:
    """A run that only describes itself."""
    fabric = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    given: dict[str, Any] = dict.fromkeys(Run.__dataclass_fields__)
    config = TrainConfig(updates=updates, precision="bf16-mixed")
    return Run(**given | {"config": config, "fabric": fabric, "module": GPT(GPTConfig.tiny())} | changes)


def test_a_line_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log(record(2, validation_loss=2.75), run_of(62), 3600.4)
    log(record(62), run_of(62), 0.0)
    assert caplog.messages == [
        "update 2/62: loss 2.5000, validation 2.7500, lr 0.001, gradient norm 0.500, 200 tokens/s, left 1:00:00",
        "update 62/62: loss 0.0806, lr 0.001, gradient norm 0.500, 200 tokens/s",
    ]


def test_a_line_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    run = run_of(2)
    needed = flops_per_token(GPTConfig.tiny(), 64)
    log(record(1, memory=3 * 2**29, tokens=round(0.2 * 989.4e12 / needed)), run, 0.0)  # in half a second, on two cards
    assert caplog.messages[0].endswith("tokens/s, MFU 20.0%, memory 1.5 GiB")


@pytest.mark.parametrize(("card", "module"), [("NVIDIA H100", GPT(GPTConfig.tiny())), ("NVIDIA H200", torch.nn.ReLU())])
def test_an_unknown_card_or_model_has_an_unknown_utilisation(
    monkeypatch: pytest.MonkeyPatch, card: str, module: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card)
    assert utilisation(run_of(2, module=module), 1e6) == "MFU unknown"


def test_no_live_line_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=40)
    with live_line(25, console) as show:
        for update in range(1, 26):
            show(record(update))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined] # a StringIO


def test_the_live_line_is_gone_after_an_error() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with contextlib.suppress(RuntimeError), live_line(25, console) as show:
        show(record(1))
        raise RuntimeError
    written = console.file.getvalue()  # type: ignore[attr-defined] # a StringIO
    assert written.index("\x1b[?25l") < written.index("\x1b[?25h")  # the cursor hides, and is shown again
    assert written.endswith("\x1b[2K")  # the line is erased


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    console = Console(file=io.StringIO(), force_terminal=True)
    with live_line(2, console) as show:
        show(record(1))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined] # a StringIO


def test_the_log_is_shown() -> None:
    console = Console(file=io.StringIO())
    logger = logging.getLogger("reference")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logging_to(console):
        logger.info("checkpoint: %s", "[out]")
        logger.warning("bfloat16")
    assert console.file.getvalue() == "checkpoint: [out]\nwarning: bfloat16\n"  # type: ignore[attr-defined] # a StringIO
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_other_ranks_show_warnings() -> None:
    console = Console(file=io.StringIO())
    with logging_to(console, first_rank=False):
        logging.getLogger("reference").info("checkpoint")
        logging.getLogger("reference").warning("bfloat16")
    assert console.file.getvalue() == "warning: bfloat16\n"  # type: ignore[attr-defined] # a StringIO


def steps(directory: Path) -> list[tuple[str, str]]:
    with metrics_file(directory).open(newline="") as lines:
        return [(row["step"], row["loss"]) for row in csv.DictReader(lines)]


def test_csv_has_a_row_per_update(tmp_path: Path) -> None:
    write = csv_metrics(tmp_path)
    write(record(1))
    write(record(2, validation_loss=1.5))
    with metrics_file(tmp_path).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["step"], row["loss"], row["validation_loss"]) for row in rows] == [
        ("1", "5.0", ""),
        ("2", "2.5", "1.5"),
    ]
    assert set(rows[0]) == {
        *("step", "loss", "learning_rate", "gradient_norm", "tokens", "validation_loss", "seconds", "memory")
    }


def test_csv_of_a_resumed_run_keeps_what_was_before_and_nothing_twice(tmp_path: Path) -> None:
    write = csv_metrics(tmp_path)
    for update in (1, 2, 3, 4):
        write(record(update))
    write = csv_metrics(tmp_path)  # from the checkpoint after update 2
    for update in (3, 4, 5):
        write(record(update, loss=9.0))
    assert steps(tmp_path) == [("1", "5.0"), ("2", "2.5"), ("3", "9.0"), ("4", "9.0"), ("5", "9.0")]


def test_csv_of_a_fresh_run_starts_anew(tmp_path: Path) -> None:
    csv_metrics(tmp_path)(record(7))
    csv_metrics(tmp_path)(record(1))
    assert steps(tmp_path) == [("1", "5.0")]


def test_metrics_that_cannot_be_written_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    write = csv_metrics(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.loggers.csv_logs.CSVLogger.log_metrics", full)
        write(record(3))
        write(record(4))
    (told,) = caplog.messages
    assert told.startswith(f"{metrics_file(tmp_path)} cannot be written after update 3 (No space left on device): the")
    write(record(5))  # there is room again
    assert [row["step"] for row in read_rows(metrics_file(tmp_path), 9)] == ["5"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a,b\n1\n", b"\0", None])
def test_a_foreign_file_in_the_place_of_the_metrics_is_no_end(tmp_path: Path, content: bytes | None) -> None:
    file = metrics_file(tmp_path)
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    csv_metrics(tmp_path)(record(3))


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("loss,step,tokens\n5.0,1,100\n4.0,2\n")
    assert [row["step"] for row in read_rows(file, before=9)] == ["1"]
    assert read_rows(tmp_path / "absent.csv", before=9) == []


def test_tensorboard_voids_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped] # no types come with it

    for first, loss in ((1, 5.0), (3, 9.0)):
        with tensorboard(tmp_path) as write:
            for update in range(first, 5):
                write(record(update, loss=loss, validation_loss=1.0 if update == 4 else None))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 9.0), (4, 9.0)]
    assert [event.step for event in events.Scalars("validation_loss")] == [4]


def test_tensorboard_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with (
        pytest.raises(ConfigurationError, match=r"pip install 'gpt-conformance\[tensorboard\]'"),
        tensorboard(tmp_path),
    ):
        pass
