"""A session turns what a subject does into outcomes, and never blames a stack for its adapter."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conformance.capabilities import CAPABILITIES
from conformance.clause import Clause, catalogue
from conformance.deviations import load_deviations
from conformance.engine import in_order_for_this_machine
from conformance.errors import AdapterFailed, NotApplicable, RunFailed, UsageError, Violation
from conformance.loading import load_subject
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.ranks import works_in_a_fork
from conformance.recording.trace import Checkpoint, TensorInfo
from conformance.runs import Runs
from conformance.session import Session
from conformance.subjects.reference import Reference, ReferencePolicy
from tests.stacks.no_base_class import NoBaseClass


def nothing() -> None:
    """Unlike a lambda it can be sent to another process."""


class Fake:
    """A stack of an embedding and a head; ``before`` runs first."""

    name, version, policy = "fake", "1", ReferencePolicy()
    lacks: Mapping[str, str] = {"load": "it has none", "any-optimizer": "it is fixed"}

    def __init__(self, before: Callable[[], Any] = nothing) -> None:
        self.before, self.runs = before, 0

    def train(self, recipe: Recipe) -> None:
        self.runs += 1
        self.before()
        model = nn.Sequential(nn.Embedding(recipe.vocab_size, 4), nn.Linear(4, recipe.vocab_size))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in recipe.batches():
            F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()


class Idle(Fake):
    """Trains nothing."""

    def train(self, recipe: Recipe) -> None:
        self.runs += 1


def rule(test: Callable[[Runs], None], *needs: str, since: str = "0.1") -> Clause:
    return Clause("DECAY-999", "It is right.", "why", "mend", "source", "bound", "must", since, needs, (), test)


def traces(runs: Runs) -> None:
    runs.trace(Recipe())


def attempts(runs: Runs) -> None:
    """Judges the stack by whether it raises."""
    error = runs.attempt(Recipe()).error
    if error is not None:
        raise Violation("no error", f"{type(error).__name__}: {error}")


def raising(error: BaseException) -> Callable[[Runs], None]:
    def clause(runs: Runs) -> None:
        raise error

    return clause


BROKEN = raising(Violation("4", "5"))
NAMES: dict[str, Any] = {}
exec(compile("import json\ndef breaks(runs): json.loads('{')", "suites/test_own.py", "exec"), NAMES)
suite_breaks: Callable[[Runs], None] = NAMES["breaks"]  # with no line of this file, which is the adapter's


def test_pass_and_fail() -> None:
    with Session(Fake()) as session:
        passed, failed = session.judge(rule(traces)), session.judge(rule(BROKEN))
    assert (passed.outcome, passed.reason, passed.expected, passed.traceback) == ("pass", "", "", "")
    assert (failed.outcome, failed.expected, failed.seen, failed.reason) == ("fail", "4", "5", "")
    assert "in clause" in failed.traceback
    assert passed.seconds > 0


def test_a_deviation_hides_neither_a_pass_nor_an_error() -> None:
    with Session(Fake(), {"DECAY-999": "upstream bug 7"}) as session:
        deviates, fixed = session.judge(rule(BROKEN)), session.judge(rule(traces))
        error = session.judge(rule(suite_breaks))
    assert (deviates.outcome, deviates.seen, deviates.reason) == ("deviates", "5", "upstream bug 7")
    assert (fixed.outcome, "upstream bug 7" in fixed.reason) == ("fixed", True)
    assert (error.outcome, error.reason.partition(": Exp")[0]) == ("error", "the suite itself broke: JSONDecodeError")


def test_not_applicable() -> None:
    with Session(Fake()) as session:
        lacking = session.judge(rule(BROKEN, "load"))
        elsewhere = session.judge(rule(raising(NotApplicable("needs a GPU"))))
    assert (lacking.outcome, lacking.reason) == ("n/a", "lacks load: it has none")
    assert (elsewhere.outcome, elsewhere.reason) == ("n/a", "needs a GPU")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lacking_a_capability_spares_the_clauses_that_need_it(capability: str) -> None:
    class Lacking(Reference):
        lacks = {capability: "for once"}

    with Session(Lacking()) as session:
        spared = {key for key, c in catalogue().items() if session.not_asked(c)}
    assert spared == {key for key, c in catalogue().items() if capability in c.needs}


def test_what_is_lacking_is_never_asked_for() -> None:
    class Poor(Reference):
        lacks = dict.fromkeys(set(CAPABILITIES) - {"gpt-shape"}, "it is poor")
        recipes: list[Recipe] = []

        def train(self, recipe: Recipe) -> None:
            self.recipes.append(recipe)
            super().train(recipe)

    with Session(Poor()) as session:
        results = [session.judge(clause) for clause in catalogue().values()]
    assert {r.outcome for r in results if set(r.clause.needs) <= {"gpt-shape"}} <= {"pass", "n/a"}
    assert {r.outcome for r in results if set(r.clause.needs) - {"gpt-shape"}} == {"n/a"}
    asked = {(r.shape, r.module, r.tied, r.precision, r.decay, r.evaluate, r.resume) for r in Poor.recipes}
    assert asked == {("gpt", None, False, "32-true", "declared", False, None)}
    options = {(r.stable_embedding, r.logits, r.initialization, r.compile, r.world_size) for r in Poor.recipes}
    assert options == {(False, "float32", "eager", False, 1)}


def test_equal_recipes_run_once_in_a_folder_of_their_own() -> None:
    folders = []

    class Writer(Fake):
        def train(self, recipe: Recipe) -> None:
            folders.append(recipe.directory)
            (recipe.directory / "weights.pt").write_text("here")
            super().train(recipe)

    with Session(subject := Writer()) as session:
        first = session.runs.trace(Recipe())
        assert session.runs.trace(Recipe(directory=Path("elsewhere"))) is first
        assert session.runs.attempt(Recipe()).trace is first
        assert session.runs.trace(Recipe(repeat=1)) is not first
        assert [c.files for c in first.checkpoints] == [(folders[0] / "weights.pt",)]
        assert [folder.parent for folder in folders] == [session.runs.directory] * 2
    assert subject.runs == len(set(folders)) == 2
    assert not session.runs.directory.exists()


def stack(body: str) -> Callable[[], None]:
    """A function of somebody else's, in a file of its own."""
    names: dict[str, Any] = {}
    exec(compile(f"import argparse, json\ndef run():\n    {body}\n", "site-packages/stack.py", "exec"), names)
    found: Callable[[], None] = names["run"]
    return found


def test_an_exception_of_the_stack_is_kept() -> None:
    with Session(Fake(stack("json.loads('{')"))) as session:
        attempt = session.runs.attempt(Recipe())
        judged, unmade = session.judge(rule(attempts)), session.judge(rule(traces))
    assert isinstance(attempt.error, json.JSONDecodeError)
    assert (judged.outcome, judged.seen.partition(":")[0]) == ("fail", "JSONDecodeError")
    assert unmade.outcome == "error"
    assert re.fullmatch(r"JSONDecodeError: .* \[adapter: test_session.py:\d+: .*\]", unmade.reason)


def test_a_failing_call_of_the_adapter_into_the_standard_library_is_its_own_fault() -> None:
    with Session(Fake(lambda: json.loads("{"))) as session:
        judged = session.judge(rule(attempts))
    assert judged.outcome == "error"


def test_a_stack_that_quits_is_no_crash(capsys: pytest.CaptureFixture[str]) -> None:
    with Session(Fake(stack("argparse.ArgumentParser().parse_args(['--oops'])"))) as session:
        assert isinstance(session.runs.attempt(Recipe()).error, SystemExit)
        reason = session.judge(rule(traces)).reason
    assert re.match(r"SystemExit: 2, after '.*error: unrecognized arguments: --oops'", reason)
    assert capsys.readouterr().err == ""


def test_the_user_can_stop_a_run() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with Session(Fake(interrupt)) as session, pytest.raises(KeyboardInterrupt):
        session.judge(rule(traces))


def test_a_subject_that_trains_nothing_is_an_error() -> None:
    with Session(Idle()) as session:
        with pytest.raises(
            AdapterFailed, match=r"Idle.train\(\) ended, but the suite saw 0 calls of a model .* and 0 updates"
        ):
            session.runs.trace(Recipe())
        assert session.judge(rule(traces)).outcome == "error"


class CommandLine(Reference):
    """Its command line prints what is wrong with a word that it does not know, and quits, as torchtitan's does."""

    def __init__(self, hint: str) -> None:
        self.hint = hint

    def train(self, recipe: Recipe) -> None:
        if "wieght_decay" in dict(recipe.optimizer.arguments):
            print(f"Unrecognized options: --optimizer.wieght-decay{self.hint}", file=sys.stderr)
            raise SystemExit(2)
        super().train(recipe)


@pytest.mark.parametrize(
    ("hint", "outcome"),
    [
        ("\nPerhaps you meant: --optimizer.weight-decay", "pass"),
        ("\nPerhaps you meant: --optimizer.amsgrad", "fail"),
        ("", "fail"),
    ],
)
def test_a_command_line_that_quits_is_judged_by_what_it_printed(hint: str, outcome: str) -> None:
    with Session(CommandLine(hint)) as session:
        assert session.judge(catalogue()["OPT-10"]).outcome == "pass"
        assert session.judge(catalogue()["OPT-11"]).outcome == outcome


class Inherited(Reference):
    """Its fault is in a method that an inherited train() calls, as anyone varies the reference."""

    def train_config(self, recipe: Recipe) -> Any:
        raise KeyError("typo")


TENSOR = TensorInfo("w", ("w",), (1,), torch.float32, "cpu", True, "Linear")


def faulty(*arguments: object) -> None:
    raise KeyError("typo")


ADAPTERS: dict[str, Any] = {
    "its own train": Fake(faulty),
    "inherited train": Inherited(),
    "no class": SimpleNamespace(name="n", version="1", lacks={}, policy=ReferencePolicy(), train=faulty),
}


@pytest.mark.parametrize("function", [traces, attempts])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_bug_of_the_adapter_is_an_error_at_its_line(adapter: str, function: Callable[..., None]) -> None:
    with Session(ADAPTERS[adapter]) as session:
        result = session.judge(rule(function))
    assert result.outcome == "error"
    assert re.fullmatch(r"KeyError: 'typo' \[adapter: test_session.py:\d+: raise KeyError.*\]", result.reason)


@pytest.mark.parametrize("part", ["load", "policy"])
def test_a_bug_beside_train_is_the_adapters_too(part: str) -> None:
    class Loads(Fake):
        lacks: Mapping[str, str] = {}
        policy: Any = SimpleNamespace(decays=faulty)

        def load(self, checkpoint: Checkpoint) -> nn.Module:
            raise KeyError("typo")

    def uses(runs: Runs) -> None:
        runs.load(Checkpoint(1, ())) if part == "load" else runs.policy.decays(Recipe(), TENSOR)

    with Session(Loads()) as session:
        result = session.judge(rule(uses))
    assert result.outcome == "error"
    assert re.fullmatch(r"KeyError: 'typo' \[adapter: test_session.py:\d+: raise KeyError.*\]", result.reason)


class Torn(Fake):
    """Two ranks that wait for each other; those named in ``version`` raise instead."""

    def train(self, recipe: Recipe) -> None:
        torch.distributed.init_process_group("gloo")
        if os.environ["RANK"] in self.version:
            raise ValueError(f"no shard for rank {os.environ['RANK']}")
        torch.distributed.barrier()
        super().train(recipe)


@pytest.mark.parametrize("ranks", ["none", "01", "0", "1"])
def test_a_rank_that_raises_is_named(ranks: str) -> None:
    subject = Torn()
    subject.version = ranks
    with Session(subject) as session:
        if ranks == "none":
            assert [len(trace.updates) for trace in session.runs.ranks(Recipe(world_size=2))] == [2, 2]
            return
        with pytest.raises(RunFailed, match=rf"rank ([{ranks}]) raised ValueError: no shard for rank \1"):
            session.runs.ranks(Recipe(world_size=2))


class Crashing(Fake):
    """Two ranks, of which one ends by the signal in ``version``."""

    def train(self, recipe: Recipe) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.Signals[self.version])
        torch.distributed.init_process_group("gloo")


@pytest.mark.parametrize(("name", "where"), [("SIGKILL", ""), ("SIGSEGV", r" in train \(test_session.py:\d+\)")])
def test_a_rank_that_a_signal_ends_is_told_with_it(name: str, where: str) -> None:
    subject = Crashing()
    subject.version = name
    told = f"the process of rank 1 ended by {name}{where} before it sent its trace"
    with Session(subject) as session, pytest.raises(RunFailed, match=told):
        session.runs.ranks(Recipe(world_size=2))


class Alone(Fake):
    """A stack that refuses two ranks, before its first update or (``version`` "late") after it."""

    def train(self, recipe: Recipe) -> None:
        if self.version == "late":
            super().train(recipe)
        raise NotApplicable("it has one device only")


def test_a_rank_may_say_that_the_stack_refuses() -> None:
    subject = Alone()
    with (
        Session(subject) as session,
        pytest.raises(NotApplicable, match="the stack refuses what the clause asks for: it has one device only"),
    ):
        session.runs.ranks(Recipe(world_size=2))
    subject.version = "late"
    with Session(subject) as session, pytest.raises(RunFailed, match=r"rank . raised NotApplicable: it has one device"):
        session.runs.ranks(Recipe(world_size=2))


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="ranks are spawned here anyway")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_ranks_are_spawned_where_autograd_refuses_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch built for CUDA, without a GPU, after a FakeTensorMode: seen with 2.11."""
    parent, backward = os.getpid(), Tensor.backward
    assert works_in_a_fork()

    def refuse(tensor: Tensor, *arguments: Any) -> None:
        if os.getpid() != parent:
            raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing.")
        backward(tensor, *arguments)

    monkeypatch.setattr(Tensor, "backward", refuse)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert not works_in_a_fork()
    with Session(NoBaseClass()) as session:  # a spawned rank has its own, unharmed method, and imports this stack anew
        assert [len(trace.updates) for trace in session.runs.ranks(Recipe(world_size=1))] == [2]


NOT_SUBJECTS: list[tuple[dict[str, Any], str]] = [
    ({"name": None}, "'name' of type str"),
    ({"version": 2}, "'version' of type str"),
    ({"lacks": ["load"]}, "'lacks' of type Mapping"),
    ({"train": None}, r"a method train\(\)"),
    ({"policy": SimpleNamespace(initial=print, decays=print)}, r"a method policy.learning_rate\(\)"),
    ({"lacks": {"load": "none", "flight": "no wings"}}, "the unknown capability 'flight'"),
    ({"lacks": {"load": " "}}, "'load' without a reason"),
    ({"lacks": {}}, r"no method load\(\)"),
    ({"__init__": faulty}, "making the subject .* raised KeyError: 'typo'"),
]
SPECS = [
    ("referense", "unknown subject"),
    ("no.such:X", "No module named 'no'"),
    ("json:Nothing", "no attribute 'Nothing'"),
]


@pytest.mark.parametrize(("changes", "message"), NOT_SUBJECTS)
def test_what_is_not_a_subject_is_refused(changes: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "candidate", type("Candidate", (Fake,), changes))
    with pytest.raises(UsageError, match=message):
        load_subject(f"{__name__}:candidate")


@pytest.mark.parametrize(("spec", "message"), SPECS)
def test_a_subject_that_is_not_there(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_subject(spec)


@pytest.mark.parametrize(
    ("text", "attribute"),
    [
        ("import torch\nmodel = torch.nn.Linear(1, 1)\nfor _ in range(3):\n    model(x).sum().backward()", "model"),
        ("class GPT: ...\ndef train():\n    loss.backward()\ntrain()", "GPT"),
        ("class GPT: ...\nif True:\n    with x:\n        torch.autograd.backward(loss)", "GPT"),
    ],
)
def test_a_script_is_not_run_by_accident(
    text: str, attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("package").mkdir()
    Path("package/__init__.py").write_text("raise KeyError('it was run')")
    for file, spec in (("train_it.py", f"train_it:{attribute}"), ("package/it.py", f"package.it:{attribute}")):
        Path(file).write_text(f"open('ran', 'w')\n{text}\n")
        with pytest.raises(UsageError, match=rf"is a script, .* python -m conformance audit -- {file}, or write"):
            load_subject(spec)
    with pytest.raises(UsageError, match="no adapter in it is named: audit it with python -m conformance audit"):
        load_subject("train_it.py")
    assert not Path("ran").exists()


def test_an_adapter_that_trains_only_when_asked_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one in the file of the loop, whose script is under ``if __name__ == "__main__"``."""
    monkeypatch.syspath_prepend(tmp_path)
    loop = "def train(model):\n    model(1).backward()\nif __name__ == '__main__':\n    train(None)\n"
    (tmp_path / "one_file_of_both.py").write_text(f"from {__name__} import Fake\n{loop}class Mine(Fake): ...\n")
    assert load_subject("one_file_of_both:Mine").name == Fake.name


DEVIATIONS = [
    (None, "cannot be read: No such file"),
    ("OPT-1 =", "is not TOML"),
    (".".join(["a"] * 30_000) + " = 1", "is nested too deeply"),
    (" . ".join(['"a"'] * 9_000) + " = 1", "is nested too deeply"),
    ("OPT-1 = " + "[" * 5_000, "is nested too deeply"),
    ("#" * (1 << 17), "has 131,072 bytes, but at most 65,536 are allowed"),
    ("\xff", "is not UTF-8 text"),
    ("[OPT-99]\nreason = 'x'", "'OPT-99', which is not a clause"),
    ("[OPT-1]\nlink = 'x'", "no reason for OPT-1"),
    ("OPT-1 = 'x'", "no reason for OPT-1"),
    ("[OPT-1]\nreason = 'x'\nuntil = '3.0'", "has until for OPT-1"),
]


@pytest.mark.parametrize(("text", "message"), DEVIATIONS)
def test_a_wrong_deviations_file(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "deviations.toml"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=message):
        load_deviations(file, ["OPT-1"])
    file.write_text("[OPT-1]\nreason = 'x'\nlink = 'https://b'")
    assert load_deviations(file, ["OPT-1"]) == {"OPT-1": "x (https://b)"}


OUTCOMES_WITHOUT_TRAINING = {"OPT-1": "fail"} | dict.fromkeys(("OPT-2", "OPT-3", "OPT-4", "OPT-10", "INIT-7"), "error")


def test_a_stack_that_never_trains_is_neither_blamed_nor_praised_for_refusing() -> None:
    clauses = catalogue()
    subject = Fake(stack("json.loads('{')"))
    subject.lacks = {"load": "it has none"}
    with Session(subject) as session:
        outcomes = {key: session.judge(clauses[key]).outcome for key in OUTCOMES_WITHOUT_TRAINING}
    assert outcomes == OUTCOMES_WITHOUT_TRAINING


def test_a_lost_gpu_is_told_in_every_clause_after_it() -> None:
    """A device-side assert leaves CUDA useless for the process: what comes then says nothing about the stack."""
    message = "CUDA error: device-side assert triggered"
    with Session(Fake()) as session:
        first = session.judge(rule(raising(RuntimeError(message))))
        after = session.judge(rule(traces))
    assert (first.outcome, after.outcome) == ("error", "error")
    assert message in first.reason
    assert "a device-side assert in DECAY-999 left the GPU useless for this process" in after.reason


def test_the_clause_that_may_cost_the_gpu_is_judged_last(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = catalogue()
    assert [identity for identity, clause in everything.items() if clause.last] == ["DATA-9"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(in_order_for_this_machine(everything)) == list(everything)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert list(in_order_for_this_machine(everything)) == [i for i in everything if i != "DATA-9"] + ["DATA-9"]


@pytest.mark.parametrize(("used", "outcome"), [("SGD", "pass"), ("PagedSGD", "pass"), ("GrokSGD", "n/a")])
def test_a_run_with_another_optimizer_than_the_one_asked_for_is_not_judged(used: str, outcome: str) -> None:
    """A class of another name may have other arithmetic; a paged one keeps its state elsewhere, and no more."""

    class Own(Fake):
        lacks: Mapping[str, str] = {"load": "it has none"}

        def train(self, recipe: Recipe) -> None:
            model = nn.Sequential(nn.Embedding(recipe.vocab_size, 4), nn.Linear(4, recipe.vocab_size))
            kind = type(used, (torch.optim.SGD,), {}) if used == "SGD" else type(used, (Plain,), {})
            optimizer = kind(model.parameters(), lr=0.1)
            for batch in recipe.batches():
                F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
                optimizer.step()

    def asks(runs: Runs) -> None:
        runs.trace(Recipe(optimizer=OptimizerChoice.of("torch.optim.SGD", lr=0.1)))

    with Session(Own()) as session:
        found = session.judge(rule(asks))
    assert found.outcome == outcome, found.reason
    if outcome == "n/a":
        assert "the run used GrokSGD, although the recipe asked for SGD" in found.reason


class Plain(torch.optim.Optimizer):
    """Gradient descent that does not derive from torch's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] # as simple as can be
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor -= group["lr"] * tensor.grad
