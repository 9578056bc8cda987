"""What a run shows and writes while it runs."""

import contextlib
import csv
import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from reference.cli.loggers import csv_metrics, metrics_file, read_rows, tensorboard
from reference.cli.progress import Meter, describe, logging_to, progress, utilisation
from reference.errors import ConfigurationError, TrainingError
from reference.training.trainer import Record


def record(update: int, **changes: Any) -> Record:
    given = {"loss": 5.0 / update, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens": 100, "seconds": 0.5}
    return Record(update=update, **(given | changes))


def ticking(times: list[float]) -> Meter:
    iterator = iter(times)
    return Meter(clock=lambda: next(iterator))


def test_speed_leaves_the_first_update_out_once_there_are_others() -> None:
    meter = Meter()
    meter.add(record(1, seconds=50.0))
    assert meter.tokens_per_second == 2.0
    meter.add(record(2))
    meter.add(record(3, tokens=300))
    assert meter.tokens_per_second == 400.0


def test_time_left_counts_evaluations_too() -> None:
    """The updates took half a second, but one came every two."""
    meter = ticking([10.0, 12.0, 14.0])
    meter.add(record(1))
    assert meter.seconds_left(9) is None
    meter.add(record(2))
    meter.add(record(3))
    assert meter.seconds_left(7) == 14.0


def test_a_line_on_the_cpu() -> None:
    meter = ticking([0.0, 60.0])
    meter.add(record(1))
    meter.add(record(2, validation_loss=2.75))
    assert describe(record(2, validation_loss=2.75), 62, meter) == (
        "2/62: loss 2.5000, validation 2.7500, left 1:00:00, 200 tokens/s, lr 0.001, gradient norm 0.500"
    )


def test_a_line_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    meter = Meter()
    now = record(1, memory=3 * 2**29, tokens=989_400)
    meter.add(now)
    mfu = utilisation(now, meter, flops_per_token=1e8, precision="bf16-mixed")
    assert mfu == "MFU 20.0%"  # 1,978,800 tokens/s of 1e8 FLOPs each, of 989.4e12
    assert "MFU 20.0%, memory 1.5 GiB" in describe(now, 2, meter, mfu)


def test_an_unknown_card_has_an_unknown_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    assert utilisation(record(1, memory=1), Meter(), 1e8, "bf16-mixed") == "MFU unknown"
    assert utilisation(record(1), Meter(), 1e8, "bf16-mixed") == ""


def test_plain_lines_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=40)
    with progress(25, 10, 1.0, "32-true", console) as show:
        for update in range(1, 26):
            show(record(update))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition("/")[0] for line in lines] == ["update 1", "update 10", "update 20", "update 25"]
    assert "\x1b" not in "".join(lines)


def test_the_live_line_is_gone_after_an_error() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with contextlib.suppress(RuntimeError), progress(25, 10, 1.0, "32-true", console) as show:
        show(record(1))
        raise RuntimeError
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert written.index("\x1b[?25l") < written.index("\x1b[?25h")  # the cursor hides, and is shown again
    assert written.endswith("\x1b[2K")  # the line is erased


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    console = Console(file=io.StringIO())
    with progress(2, 1, 1.0, "32-true", console) as show:
        show(record(1))
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_the_log_is_shown_without_the_trainers_own_line_on_each_update() -> None:
    from reference.training.trainer import log

    console = Console(file=io.StringIO())
    logger = logging.getLogger("reference")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logging_to(console):
        logger.info("checkpoint: %s", "[out]")
        logger.warning("bfloat16")
        log(record(1), 10)
    assert console.file.getvalue() == "checkpoint: [out]\nwarning: bfloat16\n"  # type: ignore[attr-defined]
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_other_ranks_show_warnings() -> None:
    console = Console(file=io.StringIO())
    with logging_to(console, first_rank=False):
        logging.getLogger("reference").info("checkpoint")
        logging.getLogger("reference").warning("bfloat16")
    assert console.file.getvalue() == "warning: bfloat16\n"  # type: ignore[attr-defined]


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


def test_metrics_that_cannot_be_written_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.fabric.loggers.csv_logs.CSVLogger.log_metrics", full)
    with pytest.raises(TrainingError, match=r"the metrics of update 3 cannot be written to .*metrics.csv \(No space"):
        csv_metrics(tmp_path)(record(3))


def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("loss,step,tokens\n5.0,1,100\n4.0,2\n")
    assert [row["step"] for row in read_rows(file, before=9)] == ["1"]
    assert read_rows(tmp_path / "absent.csv", before=9) == []


def test_tensorboard_voids_what_is_done_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

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
