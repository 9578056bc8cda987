"""From a class path and keyword arguments to an optimizer: keyword filter, decay groups, state that survives."""

import difflib
import importlib
import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.config import ConfigurationError
from reference.training.capture import captured

logger = logging.getLogger("reference")

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch 2.11 to 2.13 has fused kernels


def build_optimizer(
    class_path: str,
    arguments: Mapping[str, Any],
    model: nn.Module,
    device: torch.device,
    decay: str = "role",
    scaled: bool = False,
    capture: bool = False,
    dimensions: Mapping[str, int] | None = None,
) -> Optimizer:
    """Build an optimizer over all trainable parameters of ``model``.

    Args:
        class_path: e.g. ``torch.optim.AdamW``.
        arguments: keyword arguments for it, handed over exactly; never changed.
        model: its parameters are grouped by :func:`decay_groups`.
        device: where the parameters live; decides on ``fused``.
        decay: which tensors decay, see :func:`decay_groups`.
        scaled: gradients come multiplied by a loss scaler (16-mixed); excludes ``fused``.
        capture: let ``step`` replay a CUDA graph, see reference.training.capture.
        dimensions: of the tensors by name, where sharding has flattened them.

    Raises:
        ConfigurationError: no such class, a keyword that it does not accept, or one that it needs and lacks.
    """
    optimizer_class = find_class(class_path)
    check_keywords(optimizer_class, arguments)
    if not trainable(model):
        raise ConfigurationError(f"{type(model).__name__} has no parameter that is trainable: there is nothing to do.")
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigurationError(
            f"{class_path} computes the loss several times per step, through a closure that the Trainer has not: "
            "choose another optimizer."
        )
    keywords = added_keywords(optimizer_class, arguments, device, scaled) | dict(arguments)  # what the user said wins
    decays = accepts(optimizer_class, "weight_decay")
    groups: Any = decay_groups(model, decay, dimensions) if decays else trainable(model)
    if capture:
        optimizer_class = captured(optimizer_class)
    optimizer: Optimizer
    try:
        optimizer = optimizer_class(groups, **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{class_path} refused its arguments {keywords}: {error}") from error
    if any("lr" not in group for group in optimizer.param_groups):
        raise ConfigurationError(f"{class_path} keeps no lr in its parameter groups, which the schedule must set.")
    own_override_manager(optimizer, model)
    return optimizer


def find_class(class_path: str) -> type[Optimizer]:
    """Import the optimizer class.

    Raises:
        ConfigurationError: if there is none at that path.
    """
    module_name, _, name = class_path.rpartition(".")
    if not module_name:
        raise ConfigurationError(
            f"{class_path!r} is no class path: give module and class, for example 'torch.optim.{class_path}'."
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the last two from a path like "..AdamW"
        raise ConfigurationError(
            f"the optimizer {class_path!r} cannot be imported ({error}): install its package or correct the path."
        ) from error
    found = getattr(module, name, None)
    if found is None:
        nearest = difflib.get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {module_name}.{nearest[0]}?" if nearest else "."
        raise ConfigurationError(f"{module_name} has no {name!r}{hint}")
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise ConfigurationError(f"{class_path} is not a torch.optim.Optimizer, but {found!r}.")
    return found


def accepts(optimizer_class: type[Optimizer], keyword: str) -> bool:
    """Whether the class names this keyword itself (``**kwargs`` does not count: where it leads is unknown)."""
    return keyword in named_keywords(optimizer_class)


def named_keywords(optimizer_class: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """The keywords that the constructor names, without the parameters to optimise."""
    _, *rest = inspect.signature(optimizer_class).parameters.values()
    return {p.name: p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def check_keywords(optimizer_class: type[Optimizer], arguments: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for a keyword of the user's that the class does not accept, or a missing one.

    Only keywords that we add may be dropped. Filtering the user's as well turns a misspelt ``weight_decay`` into a
    run with the default (pykale#587, DeepTab#415).
    """
    named = named_keywords(optimizer_class)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(optimizer_class).parameters.values())
    for key in arguments:
        if key not in named and not takes_any:
            nearest = difflib.get_close_matches(key, named, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ConfigurationError(
                f"{optimizer_class.__name__} does not accept {key!r}: {hint}It accepts {', '.join(named)}."
            )
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ConfigurationError(
            f"{optimizer_class.__name__} needs {', '.join(map(repr, missing))}: add it to optimizer_args."
        )


def added_keywords(
    optimizer_class: type[Optimizer], arguments: Mapping[str, Any], device: torch.device, scaled: bool = False
) -> dict[str, Any]:
    """What we add for the user: ``fused=True`` where class and device have it. Always logged."""
    name = optimizer_class.__name__
    if "fused" in arguments:
        logger.info("optimizer: %s with fused=%s, as asked for", name, arguments["fused"])
        return {}
    # grokadamw and bitsandbytes do not know the keyword and would crash on it (litgpt#1743).
    if not accepts(optimizer_class, "fused"):
        logger.info("optimizer: %s without fused, which it does not accept", name)
        return {}
    if scaled:  # the fused kernel divides by the scale itself, and Fabric then refuses to clip
        logger.info("optimizer: %s without fused, which cannot be clipped under a loss scaler", name)
        return {}
    if device.type not in FUSED_DEVICES:
        logger.info("optimizer: %s without fused, which has no kernel on %s", name, device.type)
        return {}
    # foreach and differentiable exclude fused: whoever asks for one of them has chosen.
    chosen = [key for key in ("foreach", "differentiable") if arguments.get(key)]
    if chosen:
        logger.info("optimizer: %s without fused, because of %s=True", name, chosen[0])
        return {}
    logger.info("optimizer: %s with fused=True (accepted by the class, supported on %s)", name, device.type)
    return {"fused": True}


def trainable(model: nn.Module) -> list[Tensor]:
    """Every trainable tensor once; ``parameters()`` already lists tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def decay_groups(
    model: nn.Module, decay: str = "role", dimensions: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups: the tensors that decay, and with ``weight_decay`` 0 those that do not.

    Args:
        model: any module. Each trainable tensor lands in exactly one group; frozen ones in none.
        decay: ``role`` decides by what a tensor is for (:func:`is_decayed`), ``ndim`` decays tensors of two and
            more dimensions (nanoGPT's rule), ``all`` decays everything.
        dimensions: of the tensors by name, where sharding has flattened them. None: as they are.

    A tied tensor decays only if it would under each of its names: an embedding stays one when the head shares it.
    """
    owners = dict(model.named_modules())
    decayed: dict[int, bool] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            owner = owners[name.rpartition(".")[0]]
            ndim = parameter.ndim if dimensions is None else dimensions[unsharded_name(name)]
            verdict = decay == "all" or (ndim >= 2 if decay == "ndim" else is_decayed(name, ndim, owner))
            tensors[id(parameter)] = parameter
            decayed[id(parameter)] = decayed.get(id(parameter), True) and verdict
    groups: list[dict[str, Any]] = [
        {"params": [tensor for key, tensor in tensors.items() if decayed[key]]},
        {"params": [tensor for key, tensor in tensors.items() if not decayed[key]], "weight_decay": 0.0},
    ]
    logger.info(
        "weight decay (%s): on %d tensors, not on %d", decay, len(groups[0]["params"]), len(groups[1]["params"])
    )
    return [group for group in groups if group["params"]]


NORM = re.compile(r"norm", re.IGNORECASE)  # LayerNorm, RMSNorm, ScaleNorm, AdaptiveLayerNorm, ... of any library
EMBEDDING = re.compile(r"embed", re.IGNORECASE)
EMBEDDING_NAME = re.compile(r"(^|_)(emb|embed|embedding|embeddings|wte|wpe)(_|$)")
MEMORY_NAME = re.compile(
    r"^((memory|register|cls|mask|pooled)_tokens?|mem_k|mem_v|mem_kv|null_k|null_v|null_kv|registers?|queries)$"
)
GAIN_NAME = re.compile(r"(^|_)(scale|gain|gamma|gate|logit)(_params?)?$")  # of several dimensions in some libraries


def is_decayed(name: str, ndim: int, owner: nn.Module) -> bool:
    """Whether weight decay is for this tensor, of ``ndim`` dimensions: only for matrices that multiply activations.

    Decay pulls towards zero. For gains and biases zero is no neutral point, and rows of tables that are rarely
    looked up would fade without being used. So it leaves alone: norms of every kind (by the type of the module
    that owns the tensor, and by name in libraries that write their own), biases, embeddings, memory tokens and
    memory keys/values (x-transformers#230), gates and scales.
    """
    last = name.rpartition(".")[2]
    if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        return last != "bias"
    kind = type(owner).__name__
    if isinstance(owner, nn.Embedding) or EMBEDDING.search(kind) or EMBEDDING_NAME.search(last):
        return False
    if NORM.search(kind) or MEMORY_NAME.match(last) or GAIN_NAME.search(last):
        return False
    return ndim >= 2 and not last.endswith("bias")


def unsharded_name(name: str) -> str:
    """A parameter's name without what FSDP's wrappers add to it."""
    return name.replace("_fsdp_wrapped_module.", "")


def is_bitsandbytes(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Whether an optimizer (or its class) comes from bitsandbytes, without importing the package."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return any(base.__module__.startswith("bitsandbytes.") for base in kind.__mro__)


def own_override_manager(optimizer: Optimizer, model: nn.Module) -> None:
    """Give a bitsandbytes optimizer an override manager of its own instead of the process-wide one.

    bitsandbytes' embeddings register "keep my state in 32 bits" with a singleton, which remembers it by position
    (group and index) and by ``id``: the next bitsandbytes optimizer of the process, for any other model, inherits it
    (seen in bitsandbytes 0.50.2).
    """
    if not is_bitsandbytes(optimizer):
        return
    from bitsandbytes.optim import GlobalOptimManager

    wide = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.nn.")]
    wide = [module for module in wide if isinstance(module, nn.Embedding)]
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


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()``, with state that its class keeps in the wrong place put into the right one.

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
    """Undo :func:`optimizer_state`: restore a state into an optimizer built over the same parameters."""
    misplaced = state.get("state_in_groups", [])
    optimizer.load_state_dict({key: value for key, value in state.items() if key != "state_in_groups"})
    for group, by_position in zip(optimizer.param_groups, misplaced, strict=False):
        for key, entries in by_position.items():
            group[key] = {group["params"][position]: dict(entry) for position, entry in entries.items()}


def is_keyed_by_tensor(value: Any) -> bool:
    """Whether this is a dictionary with tensors as keys."""
    return isinstance(value, dict) and any(isinstance(key, Tensor) for key in value)
