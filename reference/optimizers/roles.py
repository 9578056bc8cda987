"""Two optimizers by role: one for the matrices of blocks, such as Muon, and one for the rest.

Muon (https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal. Its author, and the trainers
that use it, leave embeddings, the head, norms and biases to AdamW. Here both are one optimizer to the trainer: learning
rates, clipping, checkpoints and the loss scaler see the groups of both.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from reference.config import TrainConfig
from reference.errors import ConfigurationError
from reference.optimizers.classes import find_class
from reference.optimizers.decay import is_decayed

BESIDE_MUON = "torch.optim.AdamW"


def roles(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings of each optimizer of a run: that of the blocks' matrices and of the rest, or the only one.

    Raises:
        ConfigurationError: if a class cannot be imported, or cannot have that role.
    """
    rest = config.optimizer_rest
    if rest is None and issubclass(find_class(config.optimizer), torch.optim.Muon):
        rest = BESIDE_MUON
    own = replace(config, optimizer_rest=None, optimizer_rest_args={})
    if rest is None:
        if config.optimizer_rest_args:
            raise ConfigurationError(
                f"optimizer_rest_args is given, but {config.optimizer} trains every tensor: name the optimizer of the "
                f"rest in optimizer_rest, such as {BESIDE_MUON}, or leave optimizer_rest_args out."
            )
        return [own]
    if issubclass(find_class(rest), torch.optim.Muon):
        raise ConfigurationError(
            f"optimizer_rest is {rest}, which takes matrices only, but it gets embeddings, head, norms and biases: "
            f"choose another, such as {BESIDE_MUON}."
        )
    return [own, replace(own, optimizer=rest, optimizer_args=config.optimizer_rest_args)]


def class_paths(config: TrainConfig) -> str:
    """Return the class path of a run's optimizer; of two, both with ``and`` between."""
    return " and ".join(role.optimizer for role in roles(config))


def block_matrices(model: nn.Module) -> set[int]:
    """Return the ids of all trainable matrices that multiply activations inside a block.

    A block is what an ``nn.ModuleList`` holds, in this repository's GPT and in other libraries. Embeddings and the head
    stand outside; a table inside a block, a norm or a bias is not a matrix (:func:`is_decayed`). LoRA's are matrices.
    """
    modules = dict(model.named_modules())
    found: dict[int, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.split(".")[:-1]
        inside = any(isinstance(modules[".".join(path[:depth])], nn.ModuleList) for depth in range(len(path)))
        matrix = parameter.ndim == 2 and is_decayed(name, parameter.ndim, modules[".".join(path)])
        tied = found.get(id(parameter), True)  # a tensor with another name outside, such as the head's, is no matrix
        found[id(parameter)] = parameter.requires_grad and inside and matrix and tied
    return {key for key, is_one in found.items() if is_one}


class Combined(Optimizer):
    """Several optimizers as one: its groups, its state and its steps are theirs, in their order.

    The groups are the dictionaries of the members, so a learning rate that is set in one of them is the member's.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        # Not Optimizer's own constructor: it would make groups and state beside those of the members, and hooks of
        # torch would see one step more than there is.
        self.members = list(members)
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override] # an attribute in torch
        """The groups of all members."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override] # an attribute in torch
        """The state of all members, by parameter."""
        return {key: entry for member in self.members for key, entry in member.state.items()}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # torch's overloads
        """Take the step of each member."""
        if closure is not None:
            raise ConfigurationError("optimizers that are combined take no closure: call backward before the step.")
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all members."""
        for member in self.members:
            member.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return what one optimizer over all groups would return: tensors are numbered through."""
        return joined([member.state_dict() for member in self.members])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        for member, part in zip(self.members, divided(state_dict, self.members), strict=True):
            member.load_state_dict(part)

    def __repr__(self) -> str:
        return " and ".join(map(repr, self.members))


def members(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that make up this one; itself if it is a single one."""
    return optimizer.members if isinstance(optimizer, Combined) else [optimizer]


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the state dicts of several optimizers as one, whose tensors are numbered through."""
    whole: dict[str, Any] = {"state": {}, "param_groups": []}
    first = 0
    for state in states:
        whole["state"] |= {first + number: entry for number, entry in state["state"].items()}
        for group in state["param_groups"]:
            whole["param_groups"].append({**group, "params": [first + number for number in group["params"]]})
        first += count_tensors(state["param_groups"])
        others = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
        whole.setdefault("members", []).append(others)
    return whole


def divided(state: dict[str, Any], optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Undo :func:`joined`: return the part of each optimizer, by the number of its groups.

    Raises:
        ValueError: if there are more groups or fewer.
    """
    counts = [len(optimizer.param_groups) for optimizer in optimizers]
    if sum(counts) != len(state["param_groups"]):
        found = len(state["param_groups"])
        raise ValueError(f"the groups of its tensors are {found}, and those of the run {sum(counts)}")
    others = state.get("members", [{}] * len(counts))
    if not isinstance(others, list) or [type(other) for other in others] != [dict] * len(counts):
        raise ValueError("it is not that of so many optimizers")
    parts: list[dict[str, Any]] = []
    group, first = 0, 0
    for count in counts:
        groups = state["param_groups"][group : group + count]
        size = count_tensors(groups)
        entries = {n: state["state"][first + n] for n in range(size) if first + n in state["state"]}
        numbered = [{**one, "params": [number - first for number in one["params"]]} for one in groups]
        parts.append({"state": entries, "param_groups": numbered} | others[len(parts)])
        group, first = group + count, first + size
    return parts


def count_tensors(groups: Collection[dict[str, Any]]) -> int:
    """Return how many tensors the groups of a state dict have."""
    return sum(len(group["params"]) for group in groups)
