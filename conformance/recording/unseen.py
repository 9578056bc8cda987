"""Optimizers that PyTorch's hooks do not see, because they do not derive from ``torch.optim.Optimizer``.

Where none of torch's optimizers was made by the end of the first backward, they are looked for among all objects that
have ``step``, and ``param_groups`` with the model's parameters; from then on their ``step`` is watched. One that is
made later, or beside an optimizer of torch's, shows by its effect: after a backward the parameters change, and no hook
was called. Then it is looked for too; the update that gave it away is known by its effect alone.
"""

import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from conformance.recording.trace import Named
from conformance.recording.weights import Weights


class Shadow:
    """What is kept of the model's tensors at the end of a backward, to see whether they have changed since."""

    def __init__(self, tensors: dict[str, Tensor], weights: Weights) -> None:
        self.weights, self.tensors = weights, tensors
        self.values, self.measured = weights.keep(tensors), weights.measure(tensors)
        gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
        self.gradients: Named[Tensor | None] = Named({**dict.fromkeys(tensors), **weights.keep(gradients)})
        self.measured_gradients = weights.measure(gradients)

    def differs(self, tensors: dict[str, Tensor]) -> bool:
        """Return True if any tensor has changed. Others in their place, as FSDP2 puts them there, show no step."""
        same = {name: tensor for name, tensor in tensors.items() if self.tensors.get(name) is tensor}
        now = self.weights.keep(same)
        return any(
            self.values[name].shape == tensor.shape and not torch.equal(sure(self.values[name]), sure(tensor))
            for name, tensor in now.items()
        )


def sure(sample: Tensor) -> Tensor:
    """Return a sample without NaN, which stands for what other processes hold, and is not equal to itself."""
    return sample.nan_to_num() if sample.is_floating_point() else sample


def find_unseen(tensors: Iterable[Tensor]) -> list[Any]:
    """Return the objects that hold these tensors in ``param_groups`` and can ``step``, torch's optimizers excepted."""
    wanted = {id(tensor) for tensor in tensors}
    found, held = [], set[int]()
    for generation in range(3):  # young objects first: there are few of them, and a run's optimizer is often among them
        for thing in gc.get_objects(generation):
            owned = held_by(thing) & wanted
            # A wrapper, as Fabric's and Accelerate's, hands its step on to a torch.optim.Optimizer, which is seen.
            if owned and not any(isinstance(part, Optimizer) for part in vars(thing).values()):
                found.append(thing)
                held |= owned
        if held == wanted:
            break
    return found


def held_by(thing: object) -> set[int]:
    """Return the ids of the tensors in an object's ``param_groups``, if it can ``step`` and is not torch's."""
    try:
        if not hasattr(type(thing), "step") or isinstance(thing, Optimizer):
            return set()
        # Not vars(thing), which runs the code of proxies: torch.distributed.reduce_op warns.
        groups = object.__getattribute__(thing, "__dict__").get("param_groups")
        return {id(tensor) for group in groups or () for tensor in group["params"]}
    except Exception:  # an object of somebody else's, whose groups may be anything
        return set()


def watch_step(optimizer: Any, begins: Callable[..., Any], ends: Callable[..., Any]) -> Callable[[], None] | None:
    """Tell of each step of an optimizer; return a function that undoes this, or None if it cannot be done."""
    original = optimizer.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        changed = begins(optimizer, (optimizer, *args), kwargs)
        if changed is not None:
            (_, *args_), kwargs = changed
            args = tuple(args_)
        result = original(*args, **kwargs)
        ends(optimizer, args, kwargs)
        return result

    try:
        optimizer.step = step
    except AttributeError:
        return None

    def undo() -> None:
        del optimizer.step

    return undo
