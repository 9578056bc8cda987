"""Float8 in the linear layers of a GPT's blocks, by torchao (its package is imported only where it is asked for).

Input, weight and incoming gradient of a layer are scaled, rounded to 8 bits and multiplied, in forward and backward;
products are added up, and come out, in 16 bits or more. The parameters themselves, their gradients, the optimizer's
state and checkpoints are those of the run's precision, under the same names. Scales are computed anew in every forward
and backward, so nothing is to be saved. The head is left out: its error would go straight into the loss, and torchao's
own recipes leave it out too.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import TypeGuard

import torch
from torch import nn

from reference.errors import ConfigurationError
from reference.model.gpt import GPT
from reference.model.initialization import declared_std, draw
from reference.training.batches import Pairs

logger = logging.getLogger("reference")

CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}  # what the cards must have whose matrix products take float8
MULTIPLE = 16  # of all sizes that cards can multiply in float8


def use_float8(module: nn.Module, recipe: str, device: torch.device, seed: int, emulated: bool = False) -> None:
    """Have the linear layers in the blocks of a GPT multiply in float8.

    Args:
        module: a GPT, changed in place. Parameters and their names stay.
        recipe: ``tensorwise`` or ``rowwise``: one scale for each tensor, or for each row.
        device: where it will be trained.
        seed: of its weights, for a GPT on the meta device.
        emulated: round to float8, but multiply in float32: for tests, on any device.

    Raises:
        ConfigurationError: if the device, the module or the installation cannot.
    """
    if not isinstance(module, GPT):
        raise ConfigurationError(
            f"float8={recipe!r} works on reference.GPT, not on {type(module).__name__}: convert its linear layers with "
            "torchao.float8 yourself, and leave float8 out."
        )
    if not emulated:
        require_card(recipe, device)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigurationError(
            f"float8={recipe!r} needs torchao, which cannot be imported ({error}): pip install "
            "'gpt-conformance[torchao]', or leave float8 out."
        ) from error
    wanted = {id(part) for part in module.blocks.modules() if isinstance(part, nn.Linear)}
    odd = [part for part in module.blocks.modules() if isinstance(part, nn.Linear) and not is_multiple(part)]
    if odd:
        raise ConfigurationError(
            f"float8={recipe!r} needs linear layers whose sizes are multiples of {MULTIPLE}, but one is "
            f"{odd[0].in_features} x {odd[0].out_features}: choose other widths, or leave float8 out."
        )
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulated)
    convert_to_float8_training(module, config=config, module_filter_fn=lambda part, _: id(part) in wanted)
    for name, part in module.named_modules():
        if is_float8(part):  # built anew, so with the initialization of nn.Linear
            std = declared_std(name, module.config)
            part.reset_parameters = partial(draw, part, name, std, seed)  # type: ignore[assignment] # for meta
    logger.info("float8: %d linear layers multiply in float8 (%s); the head does not", len(wanted), recipe)


def require_card(recipe: str, device: torch.device) -> None:
    """Raise ConfigurationError if the device has no matrix products of float8."""
    needed = CAPABILITY[recipe]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= needed:
        return
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
    raise ConfigurationError(
        f"float8={recipe!r} needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or higher, but this run "
        f"is on {here}: leave float8 out."
    )


def is_multiple(layer: nn.Linear) -> bool:
    """Return whether a card can multiply the weight of a layer in float8."""
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def require_tokens(pairs: Pairs) -> None:
    """Raise ConfigurationError if the gradient of a weight cannot be computed in float8 from these microbatches."""
    counts = [ids.numel() for ids, _ in pairs if ids.numel() % MULTIPLE]
    if counts:
        raise ConfigurationError(
            f"a microbatch has {counts[0]} tokens, but float8 needs multiples of {MULTIPLE}: choose another "
            "microbatch_size, or leave float8 out."
        )


def is_float8(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether this is torchao's layer, told without importing its package."""
    return type(module).__name__ == "Float8Linear"


def plain_linears(module: nn.Module) -> nn.Module:
    """Put nn.Linear in the place of float8 layers, around the same parameters, and return the module."""
    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if is_float8(layer):
                with torch.device("meta"):
                    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight, plain.bias = layer.weight, layer.bias
                setattr(part, name, plain)
    return module
