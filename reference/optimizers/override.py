"""bitsandbytes, without its process-wide list of tensors that keep 32-bit state."""

from torch import nn
from torch.optim import Optimizer


def is_bitsandbytes(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Return whether an optimizer (or its class) comes from bitsandbytes, without importing the package."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return any(base.__module__.startswith("bitsandbytes.") for base in kind.__mro__)


def stable_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Return the embeddings of bitsandbytes, whose state must keep 32 bits."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [module for module in found if type(module).__module__.startswith("bitsandbytes.nn.")]


def own_override_manager(optimizer: Optimizer, model: nn.Module) -> None:
    """Give a bitsandbytes optimizer an override manager of its own instead of the process-wide one.

    bitsandbytes' embeddings register "keep my state in 32 bits" with a singleton, which remembers it by position
    (group and index) and by ``id``: the next bitsandbytes optimizer of the process, for any other model, inherits it
    (seen in bitsandbytes 0.50.2).
    """
    if not is_bitsandbytes(optimizer):
        return
    from bitsandbytes.optim import GlobalOptimManager

    wide = stable_embeddings(model)
    shared = GlobalOptimManager.get_instance()
    tensors = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    registered = [entry for entry in shared.module_weight_config_triple if id(getattr(entry[0], entry[1])) in tensors]
    own = GlobalOptimManager.__new__(GlobalOptimManager)
    own.initialize()
    own.module_weight_config_triple = [(module, "weight", {"optim_bits": 32}) for module in wide] + registered
    own.pid2config = {key: dict(config) for key, config in shared.pid2config.items() if key in tensors}
    own.uses_config_override = shared.uses_config_override
    # The singleton would also keep every embedding that was ever swapped alive.
    left = [entry for entry in shared.module_weight_config_triple if not any(entry[0] is module for module in wide)]
    shared.module_weight_config_triple[:] = left
    optimizer.mng = own  # type: ignore[attr-defined] # bitsandbytes' own attribute, set in its constructor
