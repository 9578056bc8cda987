"""Where two runs part: pairs that should agree, and pairs that differ in one thing."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import conformance
from conformance.auditing.facts import Facts
from conformance.auditing.traces import load, save
from conformance.cli import main
from conformance.recording.trace import Named
from tests.conformance.auditing.made_up import healthy, measures, set_update


@dataclass(frozen=True)
class Run:
    """A small run, and what is done otherwise in it."""

    seed: int = 0
    data: int = 1
    rate: float = 1e-2
    microbatches: int = 2
    undivided: bool = False
    limit: float = 0.1
    mixed: bool = False
    dropout: float = 0.0
    noise: int = 5
    tampered: str = ""
    frozen: str = ""
    wide: bool = False
    shuffled: bool = False


def recorded(run: Run, folder: Path) -> Path:
    """Train, audited, and keep the record."""
    torch.manual_seed(run.seed)
    width = 12 if run.wide else 8
    parts = [nn.Embedding(16, 8), nn.Dropout(run.dropout), nn.Linear(8, width), nn.GELU(), nn.LayerNorm(width)]
    model = nn.Sequential(*parts, nn.Linear(width, 16))
    generator = torch.Generator().manual_seed(run.data)
    torch.manual_seed(run.noise)
    with conformance.audit(updates=3) as verdict:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate)
        for _ in range(4):
            batch = torch.randint(16, (8, 9), generator=generator)
            batch = batch.flip(0) if run.shuffled else batch
            for rows in batch.chunk(run.microbatches):
                mixed = torch.autocast("cpu", torch.bfloat16) if run.mixed else nullcontext()
                with mixed:
                    logits = model(rows[:, :-1])
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
                (loss if run.undivided else loss / run.microbatches).backward()
            for name, parameter in model.named_parameters():
                if name == run.tampered:
                    assert parameter.grad is not None
                    parameter.grad.mul_(1.5)
                if name == run.frozen:
                    parameter.grad = None
            nn.utils.clip_grad_norm_(model.parameters(), run.limit)
            optimizer.step()
            optimizer.zero_grad()
    assert verdict.facts is not None
    folder.mkdir()
    save(verdict.facts, folder)
    return folder


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Run, Run], tuple[int, str]]:
    """Compare two runs by the command; return its exit code and what it prints."""

    def compare(first: Run, second: Run) -> tuple[int, str]:
        folders = recorded(first, tmp_path / "a"), recorded(second, tmp_path / "b")
        capsys.readouterr()
        code = main(["diff", *map(str, folders)])
        return code, " ".join(capsys.readouterr().out.split())

    return compare


Compared = Callable[[Run, Run], tuple[int, str]]


@pytest.mark.parametrize(
    "second", [Run(), Run(microbatches=4), Run(microbatches=1), Run(shuffled=True)], ids=["repeat", "4", "1", "order"]
)
def test_runs_that_should_agree_do(second: Run, compared: Compared) -> None:
    code, text = compared(Run(), second)
    assert code == 0, text
    assert "equal within noise over 3 updates" in text


@pytest.mark.parametrize(
    ("second", "where", "cause"),
    [
        (Run(seed=1), "at the start", "different initial weights"),
        (Run(data=2), "in update 1, in the data", "different data"),
        (Run(rate=1.1e-2), "in update 1, in the settings", "learning rate"),
        (Run(undivided=True), "in update 1, in the gradient", "gradient is 2 times the first run's"),
        (Run(limit=0.05), "in update 1, in the clipped gradient", "clipping: limits 0.1 and 0.05"),
        (Run(mixed=True), "in update 1", "precision"),
        (Run(dropout=0.5), "in update 1, in the forward", "dropout"),
        (Run(tampered="2.weight"), "in the clipped gradient", "2.weight"),
        (
            Run(tampered="2.weight"),
            "in update 1",
            "Tensors: 2.weight Largest",
        ),  # and not those that clipping scaled with it
        (Run(frozen="2.weight"), "in update 1, in the gradient", "part of the model gets no gradient"),
        (Run(wide=True), "at the start", "different initial weights"),
    ],
    ids=["seed", "data", "rate", "scale", "clip", "precision", "dropout", "one tensor", "only one", "frozen", "shape"],
)
def test_the_first_difference_is_named(second: Run, where: str, cause: str, compared: Compared) -> None:
    code, text = compared(Run(), second)
    assert code == 1, text
    assert where in text
    assert cause in text


def test_a_repeat_shows_what_is_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [recorded(Run(dropout=0.5, noise=n), tmp_path / str(n)) for n in (1, 2, 3)]
    capsys.readouterr()
    assert main(["diff", str(folders[0]), str(folders[1])]) == 1
    assert main(["diff", str(folders[0]), str(folders[0])]) == 0
    capsys.readouterr()
    main(["diff", str(folders[0]), str(folders[1]), "--noise", str(folders[2]), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    bounds = {entry["bound"] for entry in found["seen"] if entry["phase"] == "forward"}
    assert max(bounds) > 1e-3  # the noise of dropout, not of float32


def replicas(folder: Path, change: Callable[[Facts], None] | None = None) -> str:
    """Keep a record of four processes, of which the last is changed, and return its folder."""
    folder.mkdir()
    for rank in range(4):
        facts = healthy(rank, 4)
        if change is not None and rank == 3:
            change(facts)
        save(facts, folder)
    return str(folder)


def other_start(facts: Facts) -> None:
    weights = {**facts.trace.initial, "norm.weight": torch.ones(4)}
    facts.trace.initial, facts.trace.measured_initial = Named(weights), measures(weights)


def other_step(facts: Facts) -> None:
    weights = {**facts.updates[2].after, "norm.weight": torch.ones(4)}
    set_update(facts, 2, after=Named(weights), measured_after=measures(weights))


def other_gradient(facts: Facts) -> None:
    """Turn a gradient round, which keeps its norm."""
    gradients = {n: -g if n == "norm.weight" and g is not None else g for n, g in facts.updates[2].gradients.items()}
    set_update(facts, 2, gradients=Named(gradients))
    other_step(facts)


def other_limit(facts: Facts) -> None:
    facts.clips[2] = replace(facts.clips[2], limit=1e-3)
    factor = 1e-3 / (float(facts.clips[2].norm or 0.0) + 1e-6)
    gradients = {name: factor * g for name, g in facts.updates[2].gradients.items() if g is not None}
    set_update(facts, 2, gradients=Named(gradients), measured_gradients=measures(gradients))
    other_step(facts)


@pytest.mark.parametrize(
    ("change", "update", "phase", "words"),
    [
        (other_start, 0, "start", "process 3 differs from process 0"),
        (other_gradient, 3, "gradient", "process 3 differs from process 0"),
        (other_limit, 3, "clipped gradient", "by another factor on each process: 1, 1, 1, "),
        (other_step, 3, "parameters", "process 3 differs from process 0"),
    ],
)
@pytest.mark.parametrize("which", ["first", "second"])
def test_processes_of_one_run_that_differ_are_named(
    which: str,
    change: Callable[[Facts], None],
    update: int,
    phase: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = replicas(tmp_path / "good"), replicas(tmp_path / "bad", change)
    assert main(["diff", good, good]) == 0, capsys.readouterr().out
    capsys.readouterr()
    order = [bad, good] if which == "first" else [good, bad]
    for noise in ([], ["--noise", bad]):  # a record whose own processes differ does not make that noise
        assert main(["diff", *order, *noise, "--format", "json"]) == 1
        parted = json.loads(capsys.readouterr().out)["seen"][-1]
        assert (parted["update"], parted["phase"], parted["tensors"]) == (update, phase, ["norm.weight"])
        assert f"the processes of the {which} run hold different copies: " in parted["words"]
        assert words in parted["words"]


def test_processes_that_cannot_be_compared_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts of a model in plain tensors: the processes share a batch, and begin with different weights."""

    def part(facts: Facts) -> None:
        other_start(facts)
        other_step(facts)
        facts.trace.forwards = healthy(0, 4).trace.forwards

    folder = replicas(tmp_path / "parts", part)
    assert main(["diff", folder, folder]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Not compared: the processes of the first run with each other (the processes began with different" in text


def test_a_process_without_a_record_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = replicas(tmp_path / "torn", other_step)
    (tmp_path / "torn" / "process-3.pt").unlink()
    assert main(["diff", folder, folder]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Not compared: the processes of the first run with each other (1 of 4 left no record)" in text


def test_a_record_is_what_was_recorded(tmp_path: Path) -> None:
    facts = load(recorded(Run(), tmp_path / "a"))[0]
    assert [update.optimizer[0] for update in facts.updates] == ["torch.optim.adamw.AdamW"] * 3
    assert facts.updates[0].before["0.weight"].numel() == 64
    assert facts.trace.tensors["0.weight"].shape == (16, 8)


@pytest.mark.parametrize("content", [b"", b"no record", b"PK\x03\x04"])
def test_a_damaged_record_is_told(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "process-0.pt").write_bytes(content)
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_folder_without_a_record_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "no record of a run" in capsys.readouterr().err


def test_a_record_of_another_content_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"schema": 1, "facts": {"_kind": "Facts", "nothing": 3}}, tmp_path / "process-0.pt")
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err
