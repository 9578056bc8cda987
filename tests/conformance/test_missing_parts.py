"""A trace that lacks what a rule reads ends in a sentence: a failure or n/a, never in an error of the suite itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.clause import Clause, catalogue
from conformance.recipe import Recipe
from conformance.recording.trace import Named, Trace, Update
from conformance.runs import Attempt, Runs
from conformance.session import Session
from conformance.subjects.reference import Reference

Damage = Callable[[Trace], Trace]


def each_update(**changes: object) -> Damage:
    """Change something in every update."""
    return lambda trace: replace(trace, updates=[replace(update, **changes) for update in trace.updates])  # type: ignore[arg-type] # names of fields


def without_gradients(update: Update) -> Update:
    return replace(update, gradients=Named(dict.fromkeys(update.gradients)))


DAMAGES: dict[str, Damage] = {
    "no update": lambda trace: replace(trace, updates=[]),
    "one update": lambda trace: replace(trace, updates=trace.updates[:1]),
    "an update too many": lambda trace: replace(trace, updates=[*trace.updates, *trace.updates[-1:]]),
    "no forward": lambda trace: replace(trace, forwards=[]),
    "one forward": lambda trace: replace(trace, forwards=trace.forwards[:1]),
    "no logits": lambda trace: replace(trace, forwards=[replace(f, logits=None) for f in trace.forwards]),
    "other ids": lambda trace: replace(trace, forwards=[replace(f, ids=f.ids * 0) for f in trace.forwards]),
    "no loss": lambda trace: replace(trace, losses=[]),
    "no gradient": lambda trace: replace(trace, updates=[without_gradients(update) for update in trace.updates]),
    "no tensor of gradients": each_update(gradients=Named()),
    "no tensors after": each_update(after=Named()),
    "no tensors before": each_update(before=Named()),
    "no state": each_update(state_before={}, state_after={}),
    "an unseen optimizer": lambda trace: replace(
        trace,
        updates=[replace(u, steps=tuple(replace(s, optimizer=(), groups=()) for s in u.steps)) for u in trace.updates],
    ),
    "no groups": lambda trace: replace(
        trace, updates=[replace(u, steps=tuple(replace(s, groups=()) for s in u.steps)) for u in trace.updates]
    ),
    "no tensors": lambda trace: replace(trace, tensors=Named(), initial=Named(), buffers={}),
    "a tensor less": lambda trace: replace(
        trace,
        tensors=Named(list(trace.tensors.items())[1:]),
        initial=Named(list(trace.initial.items())[1:]),
    ),
    "no initial values": lambda trace: replace(trace, initial=Named()),
    "no embeddings": lambda trace: replace(trace, embeddings=()),
    "no checkpoint": lambda trace: replace(trace, checkpoints=[]),
    "no message": lambda trace: replace(trace, messages=[]),
    "no entropy": lambda trace: replace(trace, entropies=[]),
}


class Damaged(Runs):
    """The runs of a healthy subject, with parts of their traces missing."""

    def __init__(self, healthy: Runs, damage: Damage) -> None:
        super().__init__(healthy.subject)
        self.healthy, self.damage = healthy, damage

    def attempt(self, recipe: Recipe) -> Attempt:
        found = self.healthy.attempt(recipe)
        return replace(found, trace=self.damage(found.trace))

    def ranks(self, recipe: Recipe) -> list[Trace]:
        return [self.damage(trace) for trace in self.healthy.ranks(recipe)]


def chosen(costly: bool) -> list[Clause]:
    """Return the clauses whose runs are on several ranks, compiled or fine-tuned, or all others."""
    needs = {"two-ranks", "sharded", "compile", "finetune", "quantised"}
    return [clause for clause in catalogue().values() if bool(needs & set(clause.needs)) is costly]


@pytest.fixture(scope="module")
def healthy() -> Iterator[Session]:
    """The reference; each run happens once, when a clause first asks for it."""
    with Session(Reference()) as session:
        yield session


def broken(healthy: Session, clauses: list[Clause], damage: Damage) -> dict[str, str]:
    """What the suite itself broke on."""
    session = Session(Reference())
    session.runs = Damaged(healthy.runs, damage)
    results = [session.judge(clause) for clause in clauses]
    session.runs.close()
    wrong = {r.clause.id: r.reason for r in results if r.outcome == "error" and "the suite itself broke" in r.reason}
    silent = {r.clause.id: r.outcome for r in results if r.outcome in ("n/a", "error") and not r.reason}
    return wrong | silent


@pytest.mark.parametrize("part", DAMAGES)
def test_a_part_that_is_missing_ends_in_a_sentence(part: str, healthy: Session) -> None:
    assert len(chosen(costly=False)) > 0.7 * len(catalogue())
    assert not broken(healthy, chosen(costly=False), DAMAGES[part])


@pytest.mark.slow  # their runs
@pytest.mark.parametrize("part", DAMAGES)
def test_and_so_it_does_in_the_clauses_of_costly_runs(part: str, healthy: Session) -> None:
    assert not broken(healthy, chosen(costly=True), DAMAGES[part])


@pytest.mark.slow  # a minute
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(parts=st.lists(st.sampled_from(sorted(DAMAGES)), min_size=2, max_size=4, unique=True))
def test_several_parts_that_are_missing_end_in_a_sentence(parts: list[str], healthy: Session) -> None:
    def damage(trace: Trace) -> Trace:
        for part in parts:
            trace = DAMAGES[part](trace)
        return trace

    assert not broken(healthy, list(catalogue().values()), damage)
