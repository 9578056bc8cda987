"""From a configuration to a run: device and ranks, the module, its optimizer."""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from reference.config import GPTConfig, TrainConfig
from reference.errors import ConfigurationError
from reference.finetuning.config import FinetuneConfig
from reference.finetuning.prepare import prepare
from reference.model.gpt import GPT
from reference.model.initialization import build, choose_strategy, tied_names
from reference.model.loss import TokenLoss, token_loss
from reference.optimizers import create_optimizer, find_class, roles
from reference.optimizers.averages import has_modes, to_training
from reference.optimizers.build import accepts
from reference.optimizers.override import is_bitsandbytes
from reference.training.float8 import use_float8
from reference.training.launch import is_sharded, launch
from reference.training.run import Run
from reference.training.stopping import Stop

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("reference")

COMPUTED = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
COMPUTED["16-mixed"] = torch.float16  # in which matrix products are computed
ModelSource = GPTConfig | Callable[[], nn.Module] | nn.Module
"""A shape, a function that builds a module, or a module that is taken as it is."""


def set_up(
    model: ModelSource,
    config: TrainConfig,
    directory: Path,
    stop: Stop,
    finetune: FinetuneConfig | None = None,
    base: nn.Module | None = None,
) -> Run:
    """Build and start everything that training needs.

    Args:
        model: what to train.
        config: how to train.
        directory: where checkpoints go.
        stop: tells the run that a signal asked for its end.
        finetune: what to freeze, quantise and add.
        base: has the weights to start from; None: they are drawn.

    Raises:
        ConfigurationError: if the settings cannot work.
    """
    classes = [find_class(role.optimizer) for role in roles(config)]
    fabric = launch(config)
    if is_sharded(fabric):
        from reference.training.sharding import require_per_element

        mesh = fabric.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined] # ShardedStrategy has it
        for kind, role in zip(classes, roles(config), strict=True):
            if has_modes(kind):
                raise ConfigurationError(
                    f"{role.optimizer} is schedule-free, and its average is not gathered from several ranks: under "
                    "FSDP use another optimizer, such as torch.optim.AdamW, or use strategy='ddp'."
                )
            require_per_element(kind, role.optimizer_args, mesh)
    finetune = finetune or FinetuneConfig()
    if is_sharded(fabric) and finetune.lora_rank is not None:
        raise ConfigurationError(
            "LoRA and quantised weights are not sharded here, and fit one GPU: under FSDP set lora_rank to None, or "
            "use strategy='ddp'."
        )
    module = build_module(model, config, fabric)
    if base is not None:
        module.load_state_dict(base.state_dict())
    # Before the optimizer, which must own the tensors that are trained.
    changes = prepare(
        module,
        finetune,
        stable=wants_stable_embedding(config, classes[-1]),  # of two, the second trains embeddings
        trained=base is not None,
        dtype=COMPUTED[config.precision],
        seed=config.seed,
    )
    if config.activation_checkpointing:
        checkpoint_activations(module)
    if config.float8 != "none":
        use_float8(module, config.float8, fabric.device, config.seed)
    ties = {other: first for first, others in tied_names(module).items() for other in others}
    wrapped = fabric.setup_module(compiled(module, is_sharded(fabric)) if config.compile else module)
    bare = create_optimizer(config, module, fabric.device)
    peaks = [float(group["lr"]) for group in bare.param_groups]
    if config.min_lr is not None and config.schedule != "constant" and config.min_lr > min(peaks):
        raise ConfigurationError(
            f"min_lr is {config.min_lr}, above the optimizer's lr of {min(peaks)}: the rate would rise to it. "
            "Give a smaller one, or None for a tenth of lr."
        )
    optimizer: Any = fabric.setup_optimizers(bare)
    warn_about_rounding(config)
    wrapped.train()
    to_training(bare)
    called = wrapped._forward_module
    launches_early = getattr(called, "_orig_mod", called) is wrapped.module and not is_sharded(fabric)  # not DDP's
    return Run(
        config,
        fabric,
        module,
        wrapped,
        bare,
        optimizer,
        peaks,
        directory,
        stop,
        ties,
        launches_early=launches_early,
        finetune=finetune,
        changes=changes,
    )


def build_module(model: ModelSource, config: TrainConfig, fabric: "Fabric") -> nn.Module:
    """Return the module, built and initialised as environment and configuration want it."""
    if isinstance(model, nn.Module):
        logger.info("initialization: the module that was given keeps its weights; nothing is initialised")
        return model
    sharded = is_sharded(fabric)
    strategy = choose_strategy(config.initialization, sharded)
    factory = partial(GPT, model, config.seed) if isinstance(model, GPTConfig) else model
    fabric.seed_everything(config.seed, verbose=False)  # the same on every rank: they build the same module
    # NOTE a footgun: not empty_init=True. It skips the constructor's initialisation on one device (litgpt#689).
    with fabric.init_module(empty_init=False) if strategy == "eager" else fabric.init_tensor():
        try:
            return build(factory, strategy, fabric.device, sharded)
        except RuntimeError as error:
            if not isinstance(model, GPTConfig) or not re.search("overflowed|allocate", str(error)):
                raise
            raise ConfigurationError(f"no memory is large enough for the model of {model}.") from error


def compiled(module: nn.Module, sharded: bool) -> Any:
    """Return a module and its loss, compiled: as one graph, or under FSDP block by block.

    FSDP gathers and frees the weights of a block around its forward, which no graph can hold. So each block is a graph,
    and the last norm, and the loss. Blocks share their code: only the first is compiled.
    """
    if not sharded or not isinstance(module, GPT):
        return torch.compile(TokenLoss(module))
    for part in (*module.blocks, module.norm):
        part.forward = torch.compile(part.forward)  # inside the hooks of FSDP
    return TokenLoss(module, torch.compile(token_loss))


def wants_stable_embedding(config: TrainConfig, optimizer_class: type[Optimizer]) -> bool:
    """Return whether to swap embeddings: only if asked for, and only where an 8-bit optimizer makes use of it."""
    useful = is_bitsandbytes(optimizer_class) or accepts(optimizer_class, "keep_32bit")
    if config.stable_embedding and not useful:
        logger.info("embedding: it stays nn.Embedding, because %s is not from bitsandbytes", optimizer_class.__name__)
        return False
    return config.stable_embedding


def checkpoint_activations(module: nn.Module) -> None:
    """Have a GPT compute its blocks again in backward instead of keeping what is inside them.

    Raises:
        ConfigurationError: if the module is not a reference.GPT.
    """
    if not isinstance(module, GPT):
        raise ConfigurationError(
            f"activation_checkpointing=True works on reference.GPT, not on {type(module).__name__}: wrap its blocks "
            "with torch.utils.checkpoint yourself, and set it False."
        )
    module.checkpoint_blocks = True


def warn_about_rounding(config: TrainConfig) -> None:
    """Log what bfloat16 weights cost, where there is no float32 copy of them."""
    if config.precision == "bf16-true":
        logger.warning(
            "precision bf16-true keeps no float32 weights: an update smaller than half a unit in the last place of a "
            "weight (1/512 of it) is lost to rounding. Use bf16-mixed unless memory forbids."
        )
