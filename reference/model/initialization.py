"""Initial weights: the table, and the three ways to apply it.

====================================  ==================================  =====
parameter                             weight                              bias
====================================  ==================================  =====
linear layer                          normal(0, init_std)                 0
linear layer into the residual stream normal(0, init_std / sqrt(2 L))     0
embedding (tokens and positions)      normal(0, init_std)                 -
LayerNorm, RMSNorm                    1                                   0
rotary tables (buffers)               cos and sin of float32 phases       -
====================================  ==================================  =====

L is n_layer: GPT-2 adds 2 L sublayer outputs to the residual stream, and the factor keeps its variance.

Each tensor is drawn on the CPU in float32 from a generator of its own, seeded by the run's seed and the tensor's
name. So the start is the same, bit for bit, whatever the device, the order of construction, the number of
processes and the way of building; only the last rounding to the parameter's dtype differs.
"""

import hashlib
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reference.config import GPTConfig
from reference.errors import ConfigurationError

logger = logging.getLogger("reference")

RESIDUAL = (".attention.proj", ".mlp.proj")  # the two linear layers of a block that write into the residual stream


def initialize(model: nn.Module, config: GPTConfig, seed: int) -> None:
    """Apply the table to a GPT. On the meta device it only prepares: :func:`materialize` applies it later.

    Each submodule gets a ``reset_parameters`` of its own, the hook by which FSDP initialises a module that was
    built on the meta device. LitGPT once patched that hook and then never called it (litgpt#1150): here the
    same function binds and calls.
    """
    bind_reset_parameters(model, config, seed)
    modules = [module for module in model.modules() if owns_tensors(module)]
    if not is_large(model):
        for module in modules:
            reset(module)
        return
    # 1.3 billion weights take one core 15 s, and two 7 s. Each tensor has its own generator, so the order is free.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(reset, modules))  # raises what a thread raised


def reset(module: nn.Module) -> None:
    """Have a module of a GPT that owns tensors fill them."""
    module.reset_parameters()  # type: ignore[operator] # each has it


def is_large(model: nn.Module) -> bool:
    """Return whether threads are worth it. Not with fake tensors, whose mode is known to one thread alone."""
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and not p.is_meta]
    return sum(p.numel() for p in plain) > 10_000_000


class NoDefaultInitialization(TorchFunctionMode):
    """Inside, torch.nn.init does nothing: what a layer would draw when it is built is drawn anew from the table.

    NOTE a footgun: what is built inside holds whatever was in memory until it is initialised.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor that was to be filled."""
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def bind_reset_parameters(model: nn.Module, config: GPTConfig, seed: int) -> None:
    """Give every linear layer and embedding a ``reset_parameters`` that draws from the table."""
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            if (owner := first.setdefault(id(module.weight), name)) != name:
                reset = partial(tie, module, model, owner)
            else:
                reset = partial(draw, module, name, declared_std(name, config), seed)
            module.reset_parameters = reset  # type: ignore[assignment] # the hook that FSDP calls


def tie(module: nn.Linear | nn.Embedding, model: nn.Module, owner: str) -> None:
    """Share the weight of the submodule called ``owner``, again: materialising one module after the other unties."""
    module.weight = model.get_submodule(owner).weight  # type: ignore[assignment] # a Parameter


def declared_std(name: str, config: GPTConfig) -> float:
    """Return the standard deviation that the table gives the linear layer or embedding called ``name``."""
    if config.scale_residual_init and name.endswith(RESIDUAL):
        return config.init_std / math.sqrt(2 * config.n_layer)
    return config.init_std


@torch.no_grad()
def draw(module: nn.Linear | nn.Embedding, name: str, std: float, seed: int) -> None:
    """Draw the weight from normal(0, std), zero the bias. A tensor on the meta device is left alone."""
    if not module.weight.is_meta:
        # NOTE a footgun: filling in place on the parameter's own device would draw other numbers on CUDA than on
        # the CPU, and other numbers in bfloat16 than in float32.
        noise = torch.empty(module.weight.shape, dtype=torch.float32, device="cpu")
        fill(module.weight, noise.normal_(0.0, std, generator=generator(seed, name)))
    bias = getattr(module, "bias", None)
    if bias is not None and not bias.is_meta:
        bias.zero_()


def fill(weight: Tensor, values: Tensor) -> None:
    """Copy values into a tensor: of one that is split over ranks (FSDP), into the part that is here."""
    if type(weight.data) is not Tensor:  # torch.distributed.tensor takes its time to import
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(weight, DTensor):
            here = values.to(weight.device)
            values = distribute_tensor(here, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(values)


def generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but the seed and the name."""
    return torch.Generator().manual_seed(derive_seed(seed, name))


def derive_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits from any parts: the same in every process, unrelated for neighbouring numbers."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def owns_tensors(module: nn.Module) -> bool:
    """Return whether the module itself, not its children, holds parameters or buffers."""
    return bool(list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)))


def choose_strategy(requested: str, sharded: bool) -> str:
    """Return ``eager`` or ``meta``, by request and environment.

    Eager: built in place; under DDP with the same seed on all ranks, and DDP broadcasts rank 0's. Meta, for sharded
    runs (FSDP): no rank ever holds the whole model, and each draws what it holds.
    """
    chosen = requested if requested != "auto" else ("meta" if sharded else "eager")
    reason = "as asked for" if requested != "auto" else ("parameters are sharded" if sharded else "not sharded")
    logger.info("initialization: %s (%s)", chosen, reason)
    return chosen


def build(factory: Callable[[], nn.Module], strategy: str, device: torch.device, sharded: bool) -> nn.Module:
    """Build a module eagerly or on the meta device (:func:`choose_strategy`), and return it.

    A sharded one is left to FSDP to materialise, which does it shard by shard through ``reset_parameters``.

    Raises:
        ConfigurationError: under ``meta``, if a submodule has parameters of its own and no ``reset_parameters``.
    """
    if strategy == "eager":
        return factory()
    with torch.device("meta"):
        model = factory()
    require_reset_parameters(model)
    if not sharded:
        materialize(model, device)
    return model


def require_reset_parameters(model: nn.Module) -> None:
    """Raise ConfigurationError, naming them, if modules could not be initialised after a build on meta."""
    lost = [
        f"{name or 'the module itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if owns_tensors(module) and not callable(getattr(module, "reset_parameters", None))
    ]
    if lost:
        raise ConfigurationError(
            f"no way to initialise {', '.join(lost)} after building on the meta device: it holds parameters or "
            "buffers of its own and has no reset_parameters(). Add that method, or set initialization='eager'."
        )


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a module on the meta device real memory, and initialise all of it."""
    ties = tied_names(model)  # NOTE a footgun: to_empty() gives every name memory of its own and so unties
    model.to_empty(device=device)
    for name, others in ties.items():
        tensor = model.get_parameter(name)
        for other in others:
            owner, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(owner), attribute, tensor)
    for module in model.modules():
        if owns_tensors(module):
            module.reset_parameters()  # type: ignore[operator] # require_reset_parameters() has looked


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter with several names, the first name and the others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: others for first, *others in names.values() if others}
