"""The state of an optimizer on its way to a checkpoint and back."""

import logging
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from reference.errors import first_line

logger = logging.getLogger("reference")


STATE: dict[str, type | UnionType] = {  # what state.pt holds
    "update": int,
    "optimizer": dict | NoneType,
    "optimizer_class": str | NoneType,
    "precision": dict,
    "stable_embedding": bool,
}


def misformed(state: Any) -> str:
    """Return what is wrong with the form of a state.pt, which may be forged; empty if nothing is."""
    if not isinstance(state, dict) or not STATE.keys() <= state.keys():
        return f"it lacks some of {', '.join(sorted(STATE))}"
    wrong = [key for key, kind in STATE.items() if not isinstance(state[key], kind)]
    if isinstance(state["update"], bool) or wrong or not 0 <= state["update"] < 1 << 40:
        return f"its {(wrong or ['update'])[0]} is {type(state[(wrong or ['update'])[0]]).__name__}, or out of range"
    return ""


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return ``optimizer.state_dict()``, with state that its class keeps in the wrong place put into the right one.

    grokadamw 0.1.2 keeps its moments in ``param_groups[i]["state"]``, keyed by the tensor object. After a load the
    keys are other objects, so the moments silently start again at zero. Here they are saved by position.
    """
    state = optimizer.state_dict()
    misplaced = []
    for group, packed in zip(optimizer.param_groups, state["param_groups"], strict=True):
        by_position = {}
        for key in [key for key, value in packed.items() if is_keyed_by_tensor(value)]:
            del packed[key]
            index = {id(tensor): position for position, tensor in enumerate(group["params"])}
            by_position[key] = {index[id(tensor)]: dict(entry) for tensor, entry in group[key].items()}
        misplaced.append(by_position)
    if any(misplaced):
        logger.info("optimizer: %s keeps state in its groups; it is saved by position", type(optimizer).__name__)
        state["state_in_groups"] = misplaced
    return state


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Undo :func:`optimizer_state`: load a state into an optimizer that was built over the same parameters.

    Raises:
        ValueError: if the state has other groups, or holds a tensor that cannot belong to its parameter. Nothing is
            loaded then.
    """
    require_fitting(optimizer, state)
    state = computed_as_by(optimizer, state)
    misplaced = state.get("state_in_groups", [])
    try:
        optimizer.load_state_dict({key: value for key, value in state.items() if key != "state_in_groups"})
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # of state that was forged
        raise ValueError(first_line(error)[:150]) from error
    keep_own_dtypes(optimizer, state["state"])
    for group, by_position in zip(optimizer.param_groups, misplaced, strict=False):
        for key, entries in by_position.items():
            group[key] = {group["params"][position]: dict(entry) for position, entry in entries.items()}


# Which of PyTorch's implementations computes the step: not what is computed.
IMPLEMENTATIONS = ("capturable", "differentiable", "foreach", "fused")


def computed_as_by(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state of an optimizer, to be stepped by the implementation of this one.

    ``load_state_dict`` takes over which implementation the saved run had chosen, for its own device: a step with
    ``capturable`` cannot be done on a CPU. It also puts the count of steps where that implementation wants it.
    """
    groups = [
        group | {key: own[key] for key in IMPLEMENTATIONS if key in own}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False)  # the load refuses others
    ]
    return {**state, "param_groups": [*groups, *state["param_groups"][len(groups) :]]}


REDUCED = ("row_var", "col_var")  # Adafactor's means over the columns and the rows


def require_fitting(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError if a tensor of a saved state cannot belong to its parameter.

    Kernels do not look: they write beyond the end of a moment that has a row too few. An optimizer of torch.optim keeps
    scalars and tensors like the parameter; other libraries also keep tables of their own, in one dimension.
    """
    require_form(optimizer, state)
    of_torch = type(optimizer).__module__.startswith("torch.")
    for index, parameter in enumerate(all_parameters(optimizer)):
        for key, value in tensors_of(state["state"].get(index, {})):
            if not value.ndim or key in REDUCED:
                continue
            if value.shape != parameter.shape and (of_torch or value.ndim == parameter.ndim > 1):
                shapes = f"has the shape {tuple(value.shape)}, but that tensor has {tuple(parameter.shape)}"
                raise ValueError(f"{key} of tensor {index} {shapes}")
            if of_torch and not (value.is_floating_point() or value.is_complex()):
                raise ValueError(f"{key} of tensor {index} holds {value.dtype}, but must hold floating numbers")


def require_form(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state, which may be forged, has not the form that ``load_state_dict`` expects."""
    entries, groups = state.get("state"), state.get("param_groups")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("it has no state by the number of each tensor")
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise ValueError("it has no list of groups")
    for own, group in zip(optimizer.param_groups, groups, strict=False):
        if not isinstance(group["params"], list) or not all(isinstance(number, int) for number in group["params"]):
            raise ValueError("the tensors of its groups are not numbers")
        for key, value in group.items():
            if key != "params" and not is_like(value, own.get(key)):
                raise ValueError(f"{key} is {type(value).__name__}, but must be like {own[key]!r}")


def is_like(value: Any, own: Any) -> bool:
    """Return whether a setting of a saved group can take the place of an optimizer's own."""
    if own is None or value is None or isinstance(own, bool):
        return own is None or value is None or isinstance(value, bool)
    if isinstance(own, tuple | list):
        same = isinstance(value, tuple | list) and len(value) == len(own)
        return same and all(map(is_like, value, own))
    number = (int, float, Tensor)
    return isinstance(value, number) if isinstance(own, number) else isinstance(value, type(own))


def keep_own_dtypes(optimizer: Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Put back scalars that ``load_state_dict`` has rounded to the dtype of their parameter.

    NAdam's product of momenta is float32 for bfloat16 weights too.
    """
    for index, parameter in enumerate(all_parameters(optimizer)):
        for key, value in tensors_of(saved.get(index, {})):
            loaded = optimizer.state[parameter][key]
            if not value.ndim and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)


def tensors_of(entry: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors of a parameter's state by name, those that bitsandbytes keeps one level deeper included."""
    inner = [value for value in entry.values() if isinstance(value, dict)]
    items = [item for mapping in (entry, *inner) for item in mapping.items()]
    return [(key, value) for key, value in items if isinstance(value, Tensor)]


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, in the order by which a saved state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def is_keyed_by_tensor(value: Any) -> bool:
    """Return whether this is a dictionary with tensors as keys."""
    return isinstance(value, dict) and any(isinstance(key, Tensor) for key in value)
