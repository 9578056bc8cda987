"""The suite can fail: every mutant is killed by the clauses beside it, and harmless variants by none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.causes import FOLLOWS
from conformance.clause import catalogue
from conformance.recipe import Recipe
from conformance.session import Session
from conformance.subjects.reference import Reference
from conformance.suites.test_causality import NOT_AS_GIVEN
from tests.mutants import HARMLESS, MUTANTS, Edit, Harmless, Mutant, planted
from tests.mutants.blind import FAULTS as BLIND
from tests.mutants.blind.causes import CAUSES as BLIND_CAUSES
from tests.mutants.blind.second import FAULTS as SECOND
from tests.mutants.blind.second.causes import CAUSES as SECOND_CAUSES
from tests.mutants.blind.third import FAULTS as THIRD
from tests.mutants.blind.third.causes import CAUSES as THIRD_CAUSES
from tests.mutants.causes import CAUSES
from tests.mutants.kill_matrix import misnamed
from tests.mutants.planting import BUILD

CLAUSES = catalogue()
MATRIX = Path(__file__).parents[2] / "reports" / "kill-matrix.json"


def quick() -> set[str]:
    """One mutant for each clause: the first that names it."""
    return {next(mutant.name for mutant in MUTANTS if identity in mutant.killers) for identity in CLAUSES}


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=[] if m.name in quick() else [pytest.mark.planted], id=m.name) for m in MUTANTS],
)
def test_mutant_is_killed(mutant: Mutant) -> None:
    needed = {need for identity in mutant.killers for need in CLAUSES[identity].needs} & {"finetune"}
    if needed & set(Reference.lacks):
        pytest.skip(Reference.lacks["finetune"])
    with planted(mutant.edits), Session(Reference()) as session:
        outcomes = {identity: session.judge(CLAUSES[identity]) for identity in mutant.killers}
    survived = {identity: (r.outcome, r.reason) for identity, r in outcomes.items() if r.outcome != "fail"}
    assert not survived, f"{mutant.name} survives {survived}"


OFTEN = {"compiled", "groups-in-another-order"}
"""Harmless variants of the slow tier; each judges all clauses."""


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow if v.name in OFTEN else pytest.mark.planted, id=v.name) for v in HARMLESS],
)
def test_harmless_variant_survives(variant: Harmless) -> None:
    with planted(variant.edits), Session(variant.subject()) as session:
        results = [session.judge(clause) for clause in CLAUSES.values()]
    killed = {r.clause.id: r.seen or r.reason for r in results if r.outcome not in ("pass", "n/a")}
    assert not killed, f"{variant.name} is killed by {killed}"


def test_a_class_derived_from_the_one_asked_for_is_accepted_and_the_one_above_it_is_not() -> None:
    built = "optimizer = optimizer_class(groups, **keywords)"
    derived = Edit(BUILD, built, "optimizer = type('Own', (optimizer_class,), {})(groups, **keywords)")
    with planted((derived,)), Session(Reference()) as session:
        results = [session.judge(CLAUSES[identity]) for identity in ("OPT-1", "OPT-2", "OPT-7")]
    assert [result.outcome for result in results] == ["pass"] * 3
    above = Edit(BUILD, built, "optimizer = torch.optim.Adam(groups, **keywords)")  # from which AdamW derives
    with planted((above,)), Session(Reference()) as session:
        result = session.judge(CLAUSES["OPT-7"])
    assert (result.outcome, result.seen) == ("fail", "those of Adam")


@pytest.mark.parametrize("identity", ["CAUSAL-1", "CAUSAL-2", "CAUSAL-3"])
def test_a_stack_that_takes_other_tokens_gets_no_verdict_on_causality(identity: str) -> None:
    class Elsewhere(Reference):
        def train(self, recipe: Recipe) -> None:
            super().train(replace(recipe, altered=None))

    with Session(Elsewhere()) as session:
        result = session.judge(CLAUSES[identity])
    assert (result.outcome, result.reason) == ("n/a", NOT_AS_GIVEN)


def test_every_clause_kills_a_mutant() -> None:
    named = {identity for mutant in MUTANTS for identity in mutant.killers}
    assert set(CLAUSES) == named


def test_the_first_letter_of_every_mutant_names_its_cause() -> None:
    rows = json.loads(MATRIX.read_text(encoding="utf-8"))["mutants"]
    assert {row["mutant"] for row in rows} == {mutant.name for mutant in MUTANTS}, "run nox -s mutants -- --write again"
    assert not {row["mutant"]: told for row in rows if (told := misnamed(row))}


def test_causes_name_mutants_and_clauses() -> None:
    assert set(CAUSES) <= {mutant.name for mutant in MUTANTS}
    assert {*FOLLOWS, *(cause for causes in FOLLOWS.values() for cause in causes)} <= set(CLAUSES)


def test_mutants_are_told_apart() -> None:
    names = [mutant.name for mutant in MUTANTS] + [variant.name for variant in HARMLESS]
    assert len(names) == len(set(names))
    assert len({mutant.edits for mutant in MUTANTS}) == len(MUTANTS)


ROUNDS = {
    "blind": (BLIND, BLIND_CAUSES, "blind-mutants.json"),
    "blind2": (SECOND, SECOND_CAUSES, "blind-mutants-2.json"),
    "blind3": (THIRD, THIRD_CAUSES, "blind-mutants-3.json"),
}


@pytest.mark.parametrize("prefix", ROUNDS)
def test_blind_faults_can_still_be_planted_and_are_those_of_the_report(prefix: str) -> None:
    chapters, causes, report = ROUNDS[prefix]
    faults = [fault for chapter in chapters.values() for fault in chapter]
    for fault in faults:
        assert all(edit.old != edit.new for edit in fault.edits), fault.name
        with planted(fault.edits):
            pass
    assert {f"{prefix}-{name}" for name in causes} == {fault.name for fault in faults}
    assert {len(chapter) for chapter in chapters.values()} == {5}
    if prefix == "blind" or (MATRIX.parent / report).exists():  # a later round waits for its judgement
        rows = json.loads((MATRIX.parent / report).read_text(encoding="utf-8"))["faults"]
        assert [row["fault"] for row in rows] == [fault.name for fault in faults]


def test_blind_faults_of_all_rounds_are_different() -> None:
    assert BLIND.keys() == SECOND.keys() == THIRD.keys()
    edits = [fault.edits for chapters in (BLIND, SECOND, THIRD) for chapter in chapters.values() for fault in chapter]
    assert len(set(edits)) == len(edits)


def test_an_edit_that_does_not_fit_is_an_error() -> None:
    with (
        pytest.raises(ValueError, match="stands 0 times"),
        planted((MUTANTS[0].edits[0].__class__("reference.training.schedule:learning_rate", "no such text", ""),)),
    ):
        pass
