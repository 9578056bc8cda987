"""Sharded runs (FSDP): every rank holds a part of each tensor, and gathers a block's weights where it computes it.

It is PyTorch's second FSDP (``fully_shard``; https://arxiv.org/abs/2304.11277 describes the first): parameters keep
their names and shapes, as DTensors. Checkpoints hold whole tensors, as a run on one device writes them, so that they
can be read on another number of ranks and under another strategy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from reference.errors import CheckpointError, ConfigurationError, first_line
from reference.model.gpt import Block
from reference.model.initialization import materialize
from reference.model.loss import TokenLoss
from reference.optimizers.state import all_parameters, load_optimizer_state, optimizer_state, tensors_of

ROWS, COLUMNS = 32, 256  # per rank, of the matrix on which an optimizer is tried: enough for 8-bit state


class ShardedStrategy(ModelParallelStrategy):
    """Fabric's strategy for ``fully_shard``, over all ranks and nothing else."""

    def __init__(self, ranks: int) -> None:
        super().__init__(self.shard, data_parallel_size=ranks, tensor_parallel_size=1)

    def shard(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Shard each block of a GPT as one unit, and the rest with the root, and fill what was built on meta."""
        ranks = mesh["data_parallel"]
        for block in [part for part in module.modules() if isinstance(part, Block)]:
            fully_shard(block, mesh=ranks)
        fully_shard(module, mesh=ranks)
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            materialize(module, self.root_device)
        return module

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Scale gradients whose L2 norm over all ranks exceeds ``max_norm``, and return that norm.

        ``torch.nn.utils.clip_grad_norm_`` does the same with DTensors, tensor by tensor, which takes the host longer.
        """
        gradients = [p.grad for p in self.precision.main_params(optimizer) if p.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32)).square().sum()
        distributed.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def require_per_element(optimizer_class: type[Optimizer], arguments: Mapping[str, Any], mesh: DeviceMesh) -> None:
    """Raise ConfigurationError if an optimizer cannot train tensors that are split over the ranks.

    It takes two steps on a small matrix, once whole and once split, and must do the same, with state that can be
    gathered: scalars, and tensors split like the parameter.
    """
    shape = (ROWS * mesh.size(), COLUMNS)
    drawn = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=drawn).to(mesh.device_type) for _ in range(3)]  # parameter, two gradients
    split = [distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None) for value in values]
    try:
        expected, _ = stepped(optimizer_class, arguments, values)
        seen, state = stepped(optimizer_class, arguments, split)
        tensors = [value for _, value in tensors_of(state["state"].get(0, {})) if value.ndim]
        if "state_in_groups" in state or not all(isinstance(t, DTensor) and t.shape == shape for t in tensors):
            problem = "its state is not split like the parameter"
        elif not (isinstance(seen, DTensor) and torch.allclose(expected, seen.full_tensor())):
            problem = "it takes other steps than on whole tensors"
        else:
            return
    except Exception as error:  # an optimizer may raise anything
        problem = f"{type(error).__name__}: {first_line(error)[:150].rstrip('.')}"
    raise ConfigurationError(
        f"{optimizer_class.__name__} cannot train tensors that are split over ranks ({problem}): under FSDP use an "
        "optimizer that treats each element by itself, such as torch.optim.AdamW, or use strategy='ddp'."
    )


def stepped(
    optimizer_class: type[Optimizer], arguments: Mapping[str, Any], values: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Return a parameter after a step with each gradient, and the optimizer's state."""
    start, *gradients = values
    parameter = nn.Parameter(start.clone())
    optimizer = optimizer_class([parameter], **arguments)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), optimizer_state(optimizer)


def gathered(root: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and optimizer state of a sharded run, whole and on the CPU, as an unsharded run has them.

    Every rank must call it; on all but rank 0 the tensors are missing.
    """
    saved = get_model_state_dict(root, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    weights: dict[str, Any] = {name.removeprefix(prefix(root)): tensor for name, tensor in saved.items()}
    state = optimizer_state(optimizer)
    entries = {index: {key: whole(value) for key, value in entry.items()} for index, entry in state["state"].items()}
    return weights, {**state, "state": entries}


def whole(value: Any) -> Any:
    """Return a DTensor gathered, on the CPU of rank 0 and None elsewhere; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()  # every rank takes part
    return full.cpu() if distributed.get_rank() == 0 else None


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


def shard_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer state of an unsharded run into the optimizer of a sharded one.

    Raises:
        ValueError: as :func:`load_optimizer_state`.
    """
    parameters = all_parameters(optimizer)
    entries = {
        index: {key: split_like(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
        if index < len(parameters)
    }
    load_optimizer_state(optimizer, {**state, "state": entries})


def split_like(value: Any, parameter: Tensor) -> Any:
    """Return this rank's part of a tensor of a parameter's shape, split as the parameter is; other values as are."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    here = value.to(parameter.device_mesh.device_type)
    return distribute_tensor(here, parameter.device_mesh, parameter.placements, src_data_rank=None)


def prefix(root: nn.Module) -> str:
    """Return what stands before the names of the module that is trained: something if it is compiled with its loss."""
    return "model." if isinstance(root, TokenLoss) else ""
