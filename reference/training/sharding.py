"""Sharded runs (FSDP): weights and optimizer state, gathered on rank 0 as a run on one device has them, and back.

So a checkpoint can be read on another number of ranks and under another strategy.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from reference.errors import CheckpointError, first_line
from reference.model.loss import TokenLoss
from reference.optimizers.decay import unsharded_name


def gathered(root: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and optimizer state of a sharded run, whole and on the CPU, as an unsharded run has them.

    Every rank must call it; on all but rank 0 both are empty.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_model_state_dict(root, options=options)
    weights: dict[str, Any] = {name.removeprefix(prefix(root)): tensor for name, tensor in saved.items()}
    named = get_optimizer_state_dict(root, optimizer, options=options)
    return (weights, by_position(named)) if named else ({}, {})


def by_position(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer state with positions of parameters in place of their names."""
    names = [name for group in named["param_groups"] for name in group["params"]]
    position = {name: index for index, name in enumerate(names)}
    groups = [group | {"params": [position[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {position[name]: entry for name, entry in named["state"].items()}, "param_groups": groups}


def by_name(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Undo :func:`by_position`, for the names of each group; raise ValueError if the groups have other sizes."""
    sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != [len(group) for group in names]:
        raise ValueError(f"its groups hold {sizes} tensors, the optimizer's {[len(group) for group in names]}")
    flat = [name for group in names for name in group]
    groups = [group | {"params": of_group} for group, of_group in zip(state["param_groups"], names, strict=True)]
    return {"state": {flat[index]: entry for index, entry in state["state"].items()}, "param_groups": groups}


def shard_weights(root: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights, which every rank has, into a sharded module.

    Raises:
        CheckpointError: if they are of another model.
    """
    named: dict[str, Any] = {prefix(root) + name: tensor for name, tensor in weights.items()}
    try:
        set_model_state_dict(root, named, options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights of the checkpoint do not fit the model: {first_line(error)}. "
            "Resume with the model that was saved."
        ) from error


def shard_optimizer_state(root: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the optimizer state of an unsharded run into the optimizer of a sharded one, or raise ValueError."""
    names = {id(parameter): unsharded_name(name) for name, parameter in root.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    set_optimizer_state_dict(root, optimizer, by_name(state, groups), options=StateDictOptions(full_state_dict=True))


def prefix(root: nn.Module) -> str:
    """Return what stands before the names of the module that is trained: something if it is compiled with its loss."""
    return "model." if isinstance(getattr(root, "_fsdp_wrapped_module", root), TokenLoss) else ""
