"""Optimizers that PyTorch's hooks do not see, because they do not derive from ``torch.optim.Optimizer``.

Such a step shows by its effect: after a backward the parameters change, and no hook was called. Then the object that
did it is looked for, among all objects that have ``param_groups`` with the model's parameters, and ``step``; from then
on its ``step`` is watched. The update that gave it away is known by its effect alone.
"""

import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from conformance.recording.trace import Named


class Shadow:
    """Copies of the model's tensors at the end of a backward, to see whether they have changed since."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.gradients: Named[Tensor | None] = Named()
        for name, tensor in tensors.items():
            self.gradients[name] = None if tensor.grad is None else tensor.grad.detach().clone()

    def differs(self, tensors: dict[str, Tensor]) -> bool:
        """Return True if any tensor has changed."""
        return any(
            name in self.values
            and self.values[name].shape == tensor.shape
            and bool((self.values[name] != tensor).any())
            for name, tensor in tensors.items()
        )


def find_unseen(tensors: Iterable[Tensor]) -> list[Any]:
    """Return the objects that hold these tensors in ``param_groups`` and can ``step``, torch's optimizers excepted."""
    wanted = {id(tensor) for tensor in tensors}
    found = []
    for thing in gc.get_objects():
        try:
            groups = vars(thing).get("param_groups") if hasattr(thing, "__dict__") else None
            if not isinstance(groups, list) or isinstance(thing, Optimizer | type):
                continue
            held = {id(tensor) for group in groups for tensor in group["params"]}
            if held & wanted and callable(getattr(thing, "step", None)):
                found.append(thing)
        except Exception:  # an object of somebody else's, whose attributes may raise anything
            continue
    # A wrapper, as Fabric's and Accelerate's, hands its step on to a torch.optim.Optimizer, which is seen.
    return [thing for thing in found if not any(isinstance(part, Optimizer) for part in vars(thing).values())]


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
