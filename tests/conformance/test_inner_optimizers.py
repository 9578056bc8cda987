"""Optimizers that step inside the step of another one: which of them the record tells of."""

from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

from conformance.recording import record
from conformance.recording.trace import Trace
from tests.conformance.test_trace import NAMES, Tiny, equal, update


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.parametrize(
    ("holds", "moves", "expected"),
    [
        (3, False, ("SGD", 0.05)),  # as torchtitan's OptimizersContainer: nobody changes the rate of its own groups
        (2, False, ("Outer", 0.1)),  # as ZeroRedundancyOptimizer: the one inside has a part of the tensors
        (3, True, ("Outer", 0.1)),  # as Lookahead: it moves the weights once more
    ],
)
def test_a_step_inside_a_step_is_one_update(model: Tiny, holds: int, moves: bool, expected: tuple[str, float]) -> None:
    class Outer(Optimizer):
        def __init__(self) -> None:
            super().__init__(model.parameters(), {"lr": 0.1})
            self.inner = SGD(list(model.parameters())[:holds], lr=0.05, momentum=0.9)
            self.fails = True

        def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads say float
            if self.fails:
                self.fails = False
                raise ValueError("out of memory")
            self.inner.step()
            if moves:
                with torch.no_grad():
                    next(model.parameters()).mul_(0.5)

    optimizer = Outer()
    with record() as trace:
        with pytest.raises(ValueError, match="memory"):
            update(model, optimizer)
        for _ in range(2):
            update(model, optimizer)
    seen = [
        (step.optimizer[0].rpartition(".")[2], group.settings["lr"])
        for u in trace.updates
        for step in u.steps
        for group in step.groups
    ]
    assert seen == [expected, expected]
    assert not equal(trace.updates[0].before, trace.updates[0].after)
    states = [list(state) for u in trace.updates for state in (u.state_before, u.state_after)]
    assert states == ([[], NAMES, NAMES, NAMES] if expected[0] == "SGD" else [[], [], [], []])


class Container(Optimizer):
    """As torchtitan's OptimizersContainer: an optimizer whose step is that of others, and whose groups nobody reads."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([p for one in inner for group in one.param_groups for p in group["params"]], {"lr": 9.0})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # torch's overloads say float
        for one in self.inner:
            one.step()


def told(trace: Trace) -> list[list[tuple[list[str], float]]]:
    """Tensors and rate of each group of each update."""
    return [[(list(group.tensors), group.settings["lr"]) for group in seen.groups] for seen in trace.updates]


def test_several_optimizers_inside_one_are_steps_of_one_update(model: Tiny) -> None:
    table, head = (
        SGD(part.parameters(), lr=rate, momentum=0.9) for part, rate in ((model.table, 0.1), (model.head, 0.2))
    )
    with record() as trace:
        for _ in range(2):
            update(model, Container(table, head))
            table.param_groups[0]["lr"] /= 2
    assert told(trace) == [[(NAMES[:1], rate), (NAMES[1:], 0.2)] for rate in (0.1, 0.05)]
    assert [list(seen.state_after) for seen in trace.updates] == [NAMES, NAMES]


def test_an_optimizer_that_steps_twice_inside_another_is_one_step(model: Tiny) -> None:
    inner = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with record() as trace:
        update(model, Container(inner, inner))
    assert told(trace) == [[(NAMES, 0.1)]]
    assert (list(trace.updates[0].state_before), list(trace.updates[0].state_after)) == ([], NAMES)


def test_a_step_that_raises_after_the_one_inside_it_leaves_nothing_behind(model: Tiny) -> None:
    class Failing(SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ValueError("out of memory")
            return super().step(closure)

    table, head = SGD(model.table.parameters(), lr=0.1), Failing(model.head.parameters(), lr=0.2)
    optimizer = Container(table, head)
    with record() as trace:
        with pytest.raises(ValueError, match="memory"):
            update(model, optimizer)
        head.fails, table.param_groups[0]["lr"] = False, 0.05
        update(model, optimizer)
    assert told(trace)[-1] == [(NAMES[:1], 0.05), (NAMES[1:], 0.2)]
