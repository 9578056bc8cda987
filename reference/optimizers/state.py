"""The state of an optimizer on its way to a checkpoint and back."""

import logging
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from reference.errors import first_line
from reference.optimizers.averages import has_modes, put
from reference.optimizers.roles import divided, joined, members

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
    """Return ``optimizer.state_dict()``, with all that its class needs to go on bit for bit.

    grokadamw 0.1.2 keeps its moments in ``param_groups[i]["state"]``, keyed by the tensor object. After a load the
    keys are other objects, so the moments silently start again at zero. Here they are saved by position, in
    ``state_in_groups``. ``dtypes`` says which dtype each parameter has, and ``trained`` has the parameters of a
    schedule-free optimizer, which must be in its train mode: those that the model is saved with are their average.
    """
    parts = [state_of_one(member) for member in members(optimizer)]
    return parts[0] if len(parts) == 1 else joined(parts)


def state_of_one(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer that is not made up of others; see :func:`optimizer_state`."""
    state = optimizer.state_dict()
    parameters = all_parameters(optimizer)
    state["dtypes"] = [parameter.dtype for parameter in parameters]
    if has_modes(optimizer):
        state["trained"] = [parameter.detach().clone() for parameter in parameters]
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
    own = members(optimizer)
    if len(own) > 1:
        require_form(optimizer, state)
    parts = divided(state, own) if len(own) > 1 else [state]
    for member, part in zip(own, parts, strict=True):
        require_fitting(member, part)
    for member, part in zip(own, parts, strict=True):
        load_into_one(member, part)


def load_into_one(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer that is not made up of others; see :func:`load_optimizer_state`."""
    state = computed_as_by(optimizer, state)
    misplaced = state.get("state_in_groups", [])
    try:
        optimizer.load_state_dict({key: value for key, value in state.items() if key not in BESIDE})
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:  # of state that was forged
        raise ValueError(first_line(error)[:150]) from error
    keep_own_dtypes(optimizer, state["state"], state.get("dtypes", []))
    if "trained" in state:
        put(state["trained"], all_parameters(optimizer))
    for group, by_position in zip(optimizer.param_groups, misplaced, strict=False):
        for key, entries in by_position.items():
            group[key] = {group["params"][position]: dict(entry) for position, entry in entries.items()}


BESIDE = ("state_in_groups", "dtypes", "trained")  # what a saved state has beside that of torch

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


# State of other shapes than the parameter: Adafactor's means over columns and rows, bitsandbytes' scales of blocks.
REDUCED = ("row_var", "col_var", "absmax1", "absmax2")
KERNELS = ("torch.", "bitsandbytes.", "reference.")  # whose kernels write where the parameter's shape leads them


def require_fitting(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError if a tensor of a saved state cannot belong to its parameter.

    Kernels do not look: they write beyond the end of a moment that has a row too few. An optimizer of torch.optim keeps
    scalars and tensors like the parameter; bitsandbytes also keeps tables of its own, in one dimension. Optimizers that
    are written in Python, of other libraries, keep what they like, and torch looks at the shapes.
    """
    require_form(optimizer, state)
    require_trained(optimizer, state)
    modules = [kind.__module__ for kind in type(optimizer).__mro__ if kind is not Optimizer]
    of_torch = type(optimizer).__module__.startswith("torch.")
    if not any(module.startswith(KERNELS) for module in modules):
        return
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
    for key in BESIDE:
        if not isinstance(state.get(key, []), list):
            raise ValueError(f"its {key} is no list")
    for own, group in zip(optimizer.param_groups, groups, strict=False):
        if not isinstance(group["params"], list) or not all(isinstance(number, int) for number in group["params"]):
            raise ValueError("the tensors of its groups are not numbers")
        for key, value in group.items():
            if key != "params" and not is_like(value, own.get(key)):
                raise ValueError(f"{key} is {type(value).__name__}, but must be like {own[key]!r}")


def require_trained(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ValueError if a schedule-free optimizer's saved state lacks its parameters, or has others."""
    dtypes, trained, parameters = state.get("dtypes", []), state.get("trained"), all_parameters(optimizer)
    if not isinstance(dtypes, list) or not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
        raise ValueError("the dtypes of its tensors are not dtypes")
    if has_modes(optimizer) != (trained is not None):
        raise ValueError(f"it {'lacks' if trained is None else 'has'} parameters of a schedule-free optimizer")
    if trained is None:
        return
    shapes = [value.shape for value in trained if isinstance(value, Tensor)] if isinstance(trained, list) else []
    if shapes != [parameter.shape for parameter in parameters]:
        raise ValueError("the parameters of its schedule-free optimizer have other shapes")


def is_like(value: Any, own: Any) -> bool:
    """Return whether a setting of a saved group can take the place of an optimizer's own."""
    if own is None or value is None or isinstance(own, bool):
        return own is None or value is None or isinstance(value, bool)
    if isinstance(own, tuple | list):
        same = isinstance(value, tuple | list) and len(value) == len(own)
        return same and all(map(is_like, value, own))
    number = (int, float, Tensor)
    return isinstance(value, number) if isinstance(own, number) else isinstance(value, type(own))


def keep_own_dtypes(
    optimizer: Optimizer, saved: Mapping[int, dict[str, Any]], dtypes: Sequence[torch.dtype] = ()
) -> None:
    """Put back tensors that ``load_state_dict`` has cast to the dtype of their parameter, but are kept in another.

    NAdam's product of momenta and the means of transformers' Adafactor are float32 for bfloat16 weights too.

    Args:
        optimizer: has loaded the state.
        saved: the state by the number of each tensor, as it was saved.
        dtypes: of the parameters when it was saved: state in the same dtype follows the parameter into another. Without
            them, as in older checkpoints, only scalars are put back.
    """
    for index, parameter in enumerate(all_parameters(optimizer)):
        then = dtypes[index] if index < len(dtypes) else None
        entry = optimizer.state.get(parameter, {})
        for key, value in saved.get(index, {}).items():
            if key in entry:
                entry[key] = in_own_dtype(entry[key], value, then)


def in_own_dtype(loaded: Any, saved: Any, then: torch.dtype | None) -> Any:
    """Return a loaded value of the state, its tensors in the dtypes that they had; ``then``: that of the parameter."""
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: in_own_dtype(value, saved.get(key), then) for key, value in loaded.items()}
    if isinstance(loaded, list) and isinstance(saved, list) and len(loaded) == len(saved):
        return [in_own_dtype(value, before, then) for value, before in zip(loaded, saved, strict=True)]
    if not isinstance(loaded, Tensor) or not isinstance(saved, Tensor) or loaded.dtype == saved.dtype:
        return loaded
    apart = not saved.ndim if then is None else not saved.ndim or saved.dtype != then
    return saved.to(loaded.device) if apart else loaded


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
