"""From a class path to an optimizer: find the class, check its keywords, add ``fused`` where it works."""

import difflib
import inspect
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reference.config import TrainConfig
from reference.errors import ConfigurationError, first_line
from reference.optimizers.averages import has_modes
from reference.optimizers.classes import find_class
from reference.optimizers.decay import decay_groups
from reference.optimizers.override import own_override_manager, stable_embeddings
from reference.optimizers.roles import Combined, block_matrices, roles

logger = logging.getLogger("reference")

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch 2.11 to 2.13 has fused kernels
NARROW = (torch.float16, torch.bfloat16)


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
    """Build an optimizer over all trainable parameters of ``model``, without a TrainConfig.

    Args:
        class_path: e.g. ``torch.optim.AdamW``.
        arguments: keyword arguments for it, handed over exactly; never changed.
        model: its parameters are grouped by :func:`decay_groups`.
        device: where the parameters live; decides on ``fused``.
        decay: which tensors decay, see :func:`decay_groups`.
        scaled: gradients come multiplied by a loss scaler (16-mixed); excludes ``fused``.
        capture: must be False; True was removed.
        dimensions: of the tensors by name, where sharding has flattened them.

    Raises:
        ConfigurationError: if there is no such class, it does not accept a keyword, or it needs one that is missing.
    """
    settings: dict[str, Any] = {"optimizer": class_path, "optimizer_args": arguments, "decay": decay}
    precision: Any = "16-mixed" if scaled else "32-true"
    config = TrainConfig(**settings, precision=precision, capture_step=capture)
    return create_optimizer(config, model, device, dimensions)


def create_optimizer(
    config: TrainConfig, model: nn.Module, device: torch.device, dimensions: Mapping[str, int] | None = None
) -> Optimizer:
    """Build the optimizer of a run over all trainable parameters of ``model``; of two, both as one.

    Args:
        config: names the classes, their keyword arguments and the decay rule.
        model: see :func:`build_optimizer`, as for the others.
        device: decides on ``fused``.
        dimensions: of the tensors by name, where sharding has flattened them.

    Raises:
        ConfigurationError: if there is no such class, it does not accept a keyword, or it needs one that is missing.
    """
    first, *second = roles(config)
    for role in (first, *second):
        check_keywords(find_class(role.optimizer), role.optimizer_args)
    everything = {id(parameter) for parameter in trainable(model)}
    if not everything:
        raise ConfigurationError(f"{type(model).__name__} has no trainable parameter: there is nothing to train.")
    if not second:
        return create_one(first, model, device, dimensions)
    matrices = block_matrices(model)
    if not matrices:
        raise ConfigurationError(
            f"{type(model).__name__} has no trainable matrix in a block (what an nn.ModuleList holds) for "
            f"{first.optimizer}: train the whole model with {second[0].optimizer}."
        )
    logger.info(
        "optimizer: %s trains the %d matrices of the blocks, %s the other %d tensors",
        *(first.optimizer, len(matrices), second[0].optimizer, len(everything - matrices)),
    )
    parts = [(first, matrices), (second[0], everything - matrices)]
    return Combined([create_one(role, model, device, dimensions, part) for role, part in parts if part])


def create_one(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    dimensions: Mapping[str, int] | None = None,
    chosen: Collection[int] | None = None,
) -> Optimizer:
    """Build the optimizer that ``config`` names over the parameters whose ids are ``chosen``; None: over all.

    Raises:
        ConfigurationError: if the class refuses its arguments, or cannot be trained with.
    """
    optimizer_class, arguments = find_class(config.optimizer), config.optimizer_args
    parameters = [parameter for parameter in trainable(model) if chosen is None or id(parameter) in chosen]
    closure = inspect.signature(optimizer_class.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigurationError(
            f"{config.optimizer} computes the loss several times per step, through a closure that the Trainer does not "
            "have: choose another optimizer."
        )
    narrow = any(parameter.dtype in NARROW for parameter in parameters)
    split = any(hasattr(parameter, "device_mesh") for parameter in parameters)  # DTensors, of FSDP
    added = added_keywords(optimizer_class, config, device, narrow, split)
    keywords = added | dict(arguments)  # what the user said wins
    if accepts(optimizer_class, "keep_32bit"):  # reference.optimizers.adamw8bit
        keywords = {"keep_32bit": [module.weight for module in stable_embeddings(model)]} | keywords
    decays = accepts(optimizer_class, "weight_decay")
    groups: Any = decay_groups(model, config.decay, dimensions, chosen) if decays else parameters
    optimizer: Optimizer
    try:
        optimizer = optimizer_class(groups, **keywords)
    except Exception as error:  # a constructor may raise anything
        said = first_line(error)[:150].rstrip(".")
        raise ConfigurationError(f"{config.optimizer} refused its arguments {keywords}: {said}.") from error
    if not optimizer.param_groups or any("lr" not in group for group in optimizer.param_groups):
        raise ConfigurationError(
            f"{config.optimizer} keeps no lr in its parameter groups, but the schedule must set it there: "
            "choose another optimizer."
        )
    if any(not isinstance(group["lr"], float | int | Tensor) for group in optimizer.param_groups):
        raise ConfigurationError(
            f"{config.optimizer} has lr={optimizer.param_groups[0]['lr']}, so it finds its own rate, but the schedule "
            "must set it: give lr in its arguments, and switch off what finds one."
        )
    if has_modes(optimizer):
        logger.info("optimizer: %s is schedule-free; the model is saved and evaluated at its average", config.optimizer)
    own_override_manager(optimizer, model)
    if config.precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        # It would divide by the scale itself, and Fabric then refuses to clip.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined] # torch's own flag
    return optimizer


def accepts(optimizer_class: type[Optimizer], keyword: str) -> bool:
    """Return whether the class names this keyword itself (``**kwargs`` does not count: where it leads is unknown)."""
    return keyword in named_keywords(optimizer_class)


def named_keywords(optimizer_class: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """Return the keywords that the constructor names, without the parameters to optimise."""
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
    optimizer_class: type[Optimizer],
    config: TrainConfig,
    device: torch.device,
    narrow: bool = False,
    split: bool = False,
) -> dict[str, Any]:
    """Return what we add for the user: ``fused=True`` where class and device have it. Always logged.

    Args:
        optimizer_class: from :func:`find_class`.
        config: the user's keywords, and the precision: a loss scaler excludes ``fused``.
        device: where the parameters live.
        narrow: whether there are 16-bit parameters.
        split: whether the parameters are split over ranks.

    Raises:
        ConfigurationError: if the user asks for ``fused`` where its kernels skip elements.
    """
    name, arguments = optimizer_class.__name__, config.optimizer_args
    # torch 2.12 and 2.13: fused SGD leaves all vectorised elements of 16-bit weights as they are, without an error. The
    # fused kernels of Adam, AdamW and Adagrad move them all (tests/reference/test_optimizer.py).
    skips = narrow and device.type == "cpu" and issubclass(optimizer_class, torch.optim.SGD)
    if "fused" in arguments:
        if arguments["fused"] and skips:
            raise ConfigurationError(
                f"{name} with fused=True does not train 16-bit weights on the CPU (pytorch#191763): leave fused out."
            )
        logger.info("optimizer: %s with fused=%s, as asked for", name, arguments["fused"])
        return {}
    # grokadamw and bitsandbytes do not know the keyword and would crash on it (litgpt#1743).
    if not accepts(optimizer_class, "fused"):
        logger.info("optimizer: %s without fused, which it does not accept", name)
        return {}
    if config.precision == "16-mixed":  # the fused kernel divides by the scale itself, and Fabric then refuses to clip
        logger.info("optimizer: %s without fused, which cannot be clipped under a loss scaler", name)
        return {}
    if skips:
        logger.info("optimizer: %s without fused, which skips 16-bit weights on the CPU (pytorch#191763)", name)
        return {}
    if split and not issubclass(optimizer_class, torch.optim.Adam):  # of which AdamW is a kind
        logger.info("optimizer: %s without fused, whose kernel does not take tensors that are split over ranks", name)
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
    """Return every trainable tensor once; ``parameters()`` already lists tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
