"""Stacks that the suite had not seen: a healthy one is accused of nothing but what is true of it, a faulty one is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from conformance.clause import catalogue, find_clauses
from conformance.session import Result, Session
from conformance.subject import Subject
from tests.stacks.both_splits import BothSplits
from tests.stacks.direct_forward import DirectForward
from tests.stacks.documents import Documents
from tests.stacks.flat_masters import FlatMasterCopies
from tests.stacks.group_rates import GroupRates
from tests.stacks.in_backward import InBackward
from tests.stacks.lbfgs import Lbfgs
from tests.stacks.loss_only import LossOnly
from tests.stacks.no_base_class import NoBaseClass
from tests.stacks.one_file import OneFile
from tests.stacks.refusing import Refusing
from tests.stacks.schedule_free import ScheduleFree
from tests.stacks.script import Script
from tests.stacks.sharded_by_hand import ShardedByHand
from tests.stacks.sign_momentum import SignMomentum
from tests.stacks.sliding_window import SlidingWindow
from tests.stacks.tensor_parallel import TensorParallel
from tests.stacks.truncated import TruncatedInit
from tests.stacks.two_optimizers import TwoOptimizers
from tests.stacks.z_loss import ZLoss

CLASS = {"OPT-11": "the error of PyTorch's own class is passed on, and suggests nothing"}
UNGUARDED = {"CLIP-3": "nothing keeps a NaN from the weights"}
USUAL = CLASS | UNGUARDED
GROK = {"OPT-13": "GrokAdamW keeps its state in the wrong place, and the stack does not know"}


@dataclass
class Case:
    """A stack, and what the suite must say of it."""

    make: Callable[..., Subject]
    true: dict[str, str] = field(default_factory=dict)
    """Clauses that the healthy stack breaks, and why that is true of it."""
    faults: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    """Planted faults: the clause that kills each, and words of its expected and seen."""
    chapters: tuple[str, ...] = ()
    """To judge it by; empty: all."""
    least: int = 20
    """Clauses that the healthy stack passes at least: one to which nothing applies was not judged."""


def lightning(fault: str = "") -> Subject:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from tests.stacks.lightning_module import Lightning

    return Lightning(fault)


def trl(fault: str = "") -> Subject:
    pytest.importorskip("trl", reason="TRL is not installed")
    from tests.stacks.trl_trainer import Trl

    return Trl(fault)


STACKS = {
    "two optimizers": Case(
        TwoOptimizers,
        faults={
            "the head is in neither": ("DECAY-1", ["missing: head.weight"]),
            "only AdamW's gradients are cleared": ("ACC-5", ["the gradient is 1.1"]),
        },
    ),
    "FSDP2 by hand": Case(
        ShardedByHand,
        chapters=("DIST", "ACC", "CLIP", "INIT", "RESUME"),
        true=UNGUARDED,
        faults={
            "each rank draws its own weights": ("DIST-8", ["sharded rank 0"]),
            "each rank clips by its own norm": ("DIST-9", ["clip 0.5, one process against sharded rank 0"]),
        },
    ),
    "tensor parallelism": Case(
        TensorParallel,
        chapters=("DIST", "CLIP", "RESUME"),
        true=UNGUARDED,
        least=13,
        faults={
            "every rank adds the bias": ("DIST-9", ["one process against sharded rank 0"]),
            "each rank clips by its own norm": ("DIST-9", ["clip 0.5, one process against sharded rank 0"]),
        },
    ),
    "one file": Case(
        OneFile,
        true=USUAL | GROK,
        faults={
            "the moments start again": ("OPT-12", ["state of AdamW after the resume"]),
            "one update is done twice": ("RESUME-2", ["resumed after update 2"]),
        },
    ),
    "direct forward": Case(
        DirectForward,
        true=USUAL,
        faults={
            "only the blocks are trained": ("DECAY-1", ["missing: tokens.weight, positions.weight"]),
            "every microbatch has its own mean": ("ACC-2", ["microbatches with different numbers of targets"]),
        },
    ),
    "loss only": Case(
        LossOnly,
        true=USUAL | {"PREC-16": "it evaluates in float32, outside of autocast"},
        faults={
            "the target is the token itself": ("DATA-6", ["it is the token itself"]),
            "losses are summed": ("ACC-1", ["4 times as long"]),
            "the loss is computed in bfloat16": ("PREC-3", ["the loss computed in torch.float32", "in torch.bfloat16"]),
        },
    ),
    "in backward": Case(
        InBackward,
        true=USUAL,
        faults={
            "one optimizer is scheduled": ("LR-1", ["differ from update 1 on"]),
            "everything decays": ("DECAY-4", ["blocks.0.norm1.weight"]),
        },
    ),
    "LBFGS": Case(
        Lbfgs,
        true=UNGUARDED,
        faults={
            "gradients add up over evaluations": ("ACC-5", ["the gradient is 2.5"]),
            "the first microbatch only": ("ACC-6", ["update 1 trains on its 4 sequences, 0 to 3", "on 0"]),
        },
    ),
    "schedule-free": Case(
        ScheduleFree,
        true=USUAL
        | {
            "EVAL-3": "the way to the average and back rounds",
            "EVAL-11": "the way to the average and back rounds",
        },
        faults={
            "z is lost": ("RESUME-1", ["parameters after update"]),
            "left at the average": ("EVAL-3", ["without evaluation and with"]),
        },
    ),
    "rates per group": Case(
        GroupRates,
        true=USUAL,
        faults={
            "the schedule has one rate for all": ("LR-1", ["for tokens.weight", "differ from update 1 on"]),
            "each group is clipped by itself": ("CLIP-1", ["clipped to a global norm of"]),
        },
    ),
    "flat master copies": Case(
        FlatMasterCopies,
        true=USUAL,
        faults={
            "the first step decays": ("DECAY-2", ["also there: foreign-1"]),
            "the last group is not copied back": ("DECAY-5", ["18 of 29 did not: blocks.0.norm1.weight"]),
        },
    ),
    "sliding window": Case(
        SlidingWindow,
        true=USUAL,
        faults={
            "the window does not reach the attention": (
                "CAUSAL-3",
                ["the policy says that it is not seen", "9, 10, 11"],
            ),
            "one token too short": ("CAUSAL-3", ["at all positions that see it", "the same at 2 positions: 7, 8"]),
        },
    ),
    "documents": Case(
        partial(Documents, end=0),
        true=USUAL,
        faults={
            "documents see each other": ("CAUSAL-3", ["the policy says that it is not seen"]),
            "an end opens the next document": ("CAUSAL-3", ["at all positions that see it"]),
        },
    ),
    "documents, another end": Case(partial(Documents, end=15), true=USUAL),
    "z-loss": Case(
        ZLoss,
        true=USUAL,
        faults={
            "the loss is computed in bfloat16": ("PREC-3", ["a loss in float32", "torch.bfloat16"]),
            "the z-loss is not divided": ("ACC-1", ["4 microbatches against one batch"]),
        },
    ),
    "truncated normal": Case(
        TruncatedInit,
        true=USUAL,
        faults={
            "not cut at all": ("INIT-2", ["elements lie outside [-0.06, 0.06]"]),
            "cut at two": ("INIT-2", ["tokens.weight", "instead of 0.01973"]),
        },
    ),
    "script of globals": Case(
        Script,
        true=UNGUARDED,
        faults={
            "the head is not tied": ("TIE-1", ["34176 elements tied, 34176 untied"]),
            "every microbatch steps": (
                "ACC-6",
                ["6 updates / 30 updates: AdamW stepped again", "no backward in between"],
            ),
        },
    ),
    "both splits": Case(
        BothSplits,
        true=USUAL | GROK | {"ACC-6": "it makes one update after the last save"},
        faults={
            "one loss for both splits": ("EVAL-4", ["batches of training data evaluated"]),
            "twice the rate": ("LR-1", ["differ from update 1 on"]),
            "the schedule has no end": (
                "LR-4",
                ["or an error before the first", "a length of zero", "after 3 updates"],
            ),
        },
    ),
    "refusing": Case(
        Refusing,
        faults={
            "the check comes after the step": ("CLIP-3", ["29 of 29 tensors hold NaN"]),
            "unknown keywords are dropped": ("OPT-10", ["wieght_decay=0.5", "the run trained"]),
        },
    ),
    "no base class": Case(
        NoBaseClass,
        true=CLASS,
        faults={
            "the head is left out": ("DECAY-1", ["missing: head.weight"]),
            "vectors decay": ("DECAY-4", ["blocks.0.norm1.weight"]),
        },
    ),
    "Lightning": Case(
        lightning,
        true=USUAL
        | GROK
        | {
            "REPORT-1": "of a step with several microbatches, Lightning logs the last one's loss",
            "RESUME-1": "Lightning keeps no random state, so dropout goes on with other masks",
        },
        faults={
            "the schedule goes by epochs": ("LR-1", ["differ from update 2 on"]),
            "values are clipped": ("CLIP-1", ["each element was clipped by itself"]),
        },
    ),
    "sign of momentum": Case(
        SignMomentum,
        faults={
            "the guard is lost": ("CLIP-3", ["momentum of", "holds NaN"]),
            "gradients add up": ("ACC-5", ["gradient"]),
        },
    ),
    "TRL": Case(
        trl,
        true=USUAL | {"LR-3": "a warm-up of transformers starts at a rate of zero"},
        faults={
            "rows are shuffled": ("ACC-6", ["update 1 trains on its 4 sequences, 0 to 3"]),
            "the limit is lost": ("CLIP-1", ["clipped to a global norm of"]),
        },
    ),
}
SLOW = {"Lightning", "TRL"}
JUDGED_FIRST = {"two optimizers", "in backward", "loss only", "refusing"}  # the others: -m slow
FAULTS = [(name, fault) for name, case in STACKS.items() for fault in case.faults]


def marked(slow: bool, *values: str) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [], id=" - ".join(values))


def said(result: Result) -> str:
    return f"{result.clause.id} {result.outcome}: {result.expected} / {result.seen}{result.reason}"


@pytest.mark.parametrize("name", [marked(name not in JUDGED_FIRST, name) for name in STACKS])
def test_healthy(name: str) -> None:
    case = STACKS[name]
    with Session(case.make()) as session:
        results = [session.judge(clause) for clause in find_clauses(case.chapters).values()]
    bad = {result.clause.id: result for result in results if result.outcome in ("fail", "error")}
    assert not [said(result) for key, result in bad.items() if key not in case.true or result.outcome == "error"]
    assert set(case.true) == set(bad), "no longer true of the stack"
    assert sum(result.outcome == "pass" for result in results) >= case.least


@pytest.mark.parametrize(("name", "fault"), [marked(pair[0] in SLOW, *pair) for pair in FAULTS])
def test_faulty(name: str, fault: str) -> None:
    case = STACKS[name]
    killer, words = case.faults[fault]
    with Session(case.make(fault=fault)) as session:
        result = session.judge(catalogue()[killer])
    assert result.outcome == "fail", said(result)
    assert not [word for word in words if word not in f"{result.expected} / {result.seen}"], said(result)


def test_an_adapter_of_an_older_version_is_judged_as_then() -> None:
    subject = SignMomentum(fault="the guard is lost")
    subject.as_of = "0.1"  # type: ignore[attr-defined] # optional
    with Session(subject) as session:
        assert session.judge(catalogue()["CLIP-3"]).outcome == "pass"
