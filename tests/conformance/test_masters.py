"""Master copies: what each stretch of them stands for, and what several ranks hold together."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.recording.masters import Masters, complete, find_parts
from conformance.recording.trace import Group, Named, Step, TensorInfo, Trace, Update


def shared_memory(*values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return one memory, and views of it that hold these values."""
    memory = torch.cat([value.flatten() for value in values])
    parts = memory.split([value.numel() for value in values])
    return memory, [part.view_as(value) for part, value in zip(parts, values)]


def places(master: Tensor, tensors: list[Tensor]) -> list[tuple[int, int, int, int]]:
    """Return for each part found: where it starts, number and beginning of its tensor, and its length."""
    found = find_parts(master, tensors)
    return [
        (part.start, next(i for i, t in enumerate(tensors) if t is part.tensor), part.begin, part.length)
        for part in found
    ]


def test_views_of_one_memory_are_known_by_their_place_though_all_are_alike() -> None:
    memory, views = shared_memory(torch.ones(3), torch.zeros(2), torch.ones(3))
    assert places(memory.clone(), views[::-1]) == [(5, 0, 0, 3), (3, 1, 0, 2), (0, 2, 0, 3)]


def test_a_stretch_of_a_memory_cuts_tensors() -> None:
    memory, views = shared_memory(torch.arange(4.0), torch.arange(4.0, 10.0), torch.arange(10.0, 12.0))
    assert places(memory[6:].clone(), views) == [(0, 1, 2, 4), (4, 2, 0, 2)]


def test_whole_tensors_stand_in_the_models_order_and_zeros_may_follow() -> None:
    tensors = [torch.randn(3).bfloat16(), torch.ones(2), torch.randn(2, 2), torch.ones(2)]
    master = torch.cat([tensors[2].flatten(), tensors[1], tensors[3], torch.zeros(3)])
    assert places(master, tensors) == [(0, 2, 0, 4), (4, 1, 0, 2), (6, 3, 0, 2)]
    assert places(tensors[0].float(), tensors) == [(0, 0, 0, 3)]


@pytest.mark.parametrize("stranger", [torch.randn(5), torch.cat([torch.ones(2), torch.randn(3)]), torch.zeros(5)])
def test_what_has_other_values_is_no_master_copy(stranger: Tensor) -> None:
    masters = Masters(flat_only=False)
    tensors = {"one": nn.Parameter(torch.ones(2)), "two": nn.Parameter(torch.randn(3))}
    optimizer = torch.optim.SGD([nn.Parameter(stranger)])
    masters.look(optimizer, tensors)
    assert masters.of(optimizer) == []
    assert masters.seen(optimizer) is optimizer


def test_groups_gradients_and_state_are_seen_through_a_master_copy() -> None:
    memory, views = shared_memory(torch.randn(2, 2), torch.randn(3))
    tensors = {name: nn.Parameter(torch.empty(0)) for name in ("one", "two")}
    for tensor, view in zip(tensors.values(), views):
        tensor.data = view
    master = nn.Parameter(memory.clone())
    optimizer = torch.optim.Adam([master])
    masters = Masters(flat_only=True)
    masters.look(optimizer, tensors)
    master.grad = torch.arange(7.0)
    optimizer.step()
    assert [t is s for t, s in zip(masters.held_by(optimizer.param_groups[0]), tensors.values())] == [True, True]
    gradients = masters.gradients(optimizer)
    assert torch.equal(gradients[id(tensors["one"])], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    state = masters.seen(optimizer).state
    assert torch.equal(state[tensors["two"]]["exp_avg"], optimizer.state[master]["exp_avg"][4:])
    assert state[tensors["two"]]["step"] == 1


def test_ranks_hold_a_tensor_together() -> None:
    def trace(rank: int, held: dict[str, tuple[int, int]], gradient: dict[str, Tensor | None]) -> Trace:
        infos = {
            name: TensorInfo(name, (name,), (2,), torch.float32, "cpu", True, "Linear")
            for name in ("one", "two", "three")
        }
        state = {name: {"m": gradient[name], "step": 1} for name in held}
        step = Step(("SGD",), (Group(tuple(held), {"lr": 0.1}),), autocast=False)
        update = Update((step,), Named(gradient), Named(), Named(), {}, state)
        return Trace(rank=rank, tensors=Named(infos), shares=held, updates=[update])

    one, two, three = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([5.0, 6.0])
    first = trace(0, {"one": (0, 2), "two": (0, 1)}, {"one": one, "two": two, "three": None})
    second = trace(1, {"two": (1, 2), "three": (0, 2)}, {"one": None, "two": torch.tensor([0.0, 4.0]), "three": three})
    complete([first, second])
    for found in (first.updates[0], second.updates[0]):
        assert found.groups[0].tensors == ("one", "two", "three")
        gradients: dict[str, Any] = dict(found.gradients)
        for values in (gradients, {name: entry["m"] for name, entry in found.state_after.items()}):
            assert values["one"] is one
            assert values["two"].tolist() == [3.0, 4.0]
            assert values["three"] is three
