"""What a run keeps in a checkpoint, and how it goes on from one: on one device, on several, sharded or not.

The weights and the optimizer state of a sharded run (FSDP) are gathered on rank 0 and written as a run on one device
would write them. So a checkpoint can be read on another number of ranks and under another strategy.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from reference.checkpoint import folder as checkpoint
from reference.config import TrainConfig
from reference.optimizers.build import load_optimizer_state, unsharded_name
from reference.training.update import TokenLoss

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("reference")


def restore(
    folder: Path, fabric: "Fabric", module: nn.Module, optimizer: Optimizer, config: TrainConfig, root: Any = None
) -> int:
    """Load a checkpoint into module and optimizer; the number of updates it has done.

    Args:
        folder: the checkpoint.
        fabric: its precision gets the loss scaler's state.
        module: the module to train.
        optimizer: over its parameters.
        config: of this run; its settings win over those in the saved parameter groups.
        root: the outermost sharded module, if parameters are sharded.

    Raises:
        CheckpointError: if it does not fit them.
    """
    state = checkpoint.load_state(folder)
    if state["optimizer"] is None:  # weights alone, from import_huggingface
        load_weights(folder, module, root)
        logger.info("resume: the weights of %s; it has no optimizer state, which starts afresh", folder)
        return int(state["update"])
    if state["optimizer_class"] != config.optimizer:
        raise checkpoint.CheckpointError(
            f"{folder} was trained with {state['optimizer_class']}, not {config.optimizer}: "
            "resume with the same optimizer, or start afresh."
        )
    saved = computed_as_by(optimizer, state["optimizer"])
    given = [{key: group[key] for key in config.optimizer_args if key in group} for group in optimizer.param_groups]
    try:
        load_weights(folder, module, root)
        if root is None:
            load_optimizer_state(optimizer, saved)
        else:
            shard_optimizer_state(root, optimizer, saved)
    except ValueError as error:  # other groups: another decay policy, or tensors that were frozen since
        raise checkpoint.CheckpointError(f"the optimizer state in {folder} does not fit: {error}.") from error
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        for key, value in settings.items():
            # The saved values would replace the configured ones. The learning rate follows the schedule anyway.
            if key != "lr" and group[key] != value:
                logger.info("resume: %s is %s, as configured now, not %s, as saved", key, value, group[key])
                group[key] = value
    fabric.strategy.precision.load_state_dict(state["precision"])
    logger.info("resume: from %s, after update %d", folder, state["update"])
    return int(state["update"])


# Which of PyTorch's implementations computes the step: not what is computed.
IMPLEMENTATIONS = ("capturable", "differentiable", "foreach", "fused")


def computed_as_by(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state of an optimizer, to be stepped by the implementation of this one.

    ``load_state_dict`` takes over which implementation the saved run had chosen, for its own device: a step without
    ``capturable`` cannot be captured, and one with it cannot be done on a CPU. It also puts the count of steps where
    that implementation wants it.
    """
    groups = [
        group | {key: own[key] for key in IMPLEMENTATIONS if key in own}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False)  # the load refuses others
    ]
    return {**state, "param_groups": [*groups, *state["param_groups"][len(groups) :]]}


def load_weights(folder: Path, module: nn.Module, root: Any) -> None:
    """Load the weights of a checkpoint into a module, or into the shards of it under ``root``."""
    if root is None:
        checkpoint.load_model(folder, module)
    else:
        shard_weights(root, checkpoint.load_weights(folder))


def gathered(root: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and optimizer state of a sharded run, whole and on the CPU, as an unsharded run has them.

    Every rank must call it; on the others than rank 0 both are empty.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_model_state_dict(root, options=options)
    weights: dict[str, Any] = {name.removeprefix(prefix(root)): tensor for name, tensor in saved.items()}
    named = get_optimizer_state_dict(root, optimizer, options=options)
    if not named:
        return {}, {}
    return weights, by_position(named)


def by_position(named: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer state with names of parameters in place of their positions, the other way round."""
    names = [name for group in named["param_groups"] for name in group["params"]]
    position = {name: index for index, name in enumerate(names)}
    groups = [group | {"params": [position[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {position[name]: entry for name, entry in named["state"].items()}, "param_groups": groups}


def by_name(state: Mapping[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """Undo :func:`by_position`.

    Args:
        state: as an unsharded optimizer gives it.
        names: of the parameters of each group, in the optimizer's order.

    Raises:
        ValueError: if the groups have other sizes.
    """
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
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    named: dict[str, Any] = {prefix(root) + name: tensor for name, tensor in weights.items()}
    try:
        set_model_state_dict(root, named, options=StateDictOptions(full_state_dict=True))
    except RuntimeError as error:
        raise checkpoint.CheckpointError(
            f"the weights of the checkpoint do not fit the model: {checkpoint.first_line(error)}. "
            "Resume with the model that was saved."
        ) from error


def shard_optimizer_state(root: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the optimizer state of an unsharded run into the optimizer of a sharded one.

    Raises:
        ValueError: if it has other groups.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names = {id(parameter): unsharded_name(name) for name, parameter in root.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(root, optimizer, by_name(state, groups), options=options)


def prefix(root: nn.Module) -> str:
    """What stands before the names of the module that is trained, where it is compiled together with its loss."""
    return "model." if isinstance(getattr(root, "_fsdp_wrapped_module", root), TokenLoss) else ""
