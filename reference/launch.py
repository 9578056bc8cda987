"""Fabric, started as the configuration says: accelerator, ranks, strategy, precision."""

import atexit
import logging
from typing import TYPE_CHECKING, Any

import torch

from reference.config import ConfigurationError, TrainConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("reference")


def launch(config: TrainConfig) -> "Fabric":
    """Start Fabric with the precision that was asked for, or refuse.

    Raises:
        ConfigurationError: if there is no such accelerator or strategy here, or the device cannot compute in that
            precision.
    """
    from lightning.fabric import Fabric

    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=sharding() if config.strategy == "fsdp" and config.accelerator != "cpu" else config.strategy,
            precision=config.precision,
        )
    except (ValueError, RuntimeError, ImportError) as error:  # the last: a strategy whose package is missing
        raise ConfigurationError(
            f"Fabric refuses accelerator={config.accelerator!r}, devices={config.devices}, "
            f"strategy={config.strategy!r}, precision={config.precision!r}: {str(error).splitlines()[0]}"
        ) from error
    if config.precision == "16-mixed" and fabric.device.type == "cpu":
        # Fabric would go on in bf16-mixed with a warning: a precision that nobody asked for.
        raise ConfigurationError("precision='16-mixed' needs a GPU: on the CPU choose 'bf16-mixed' or '32-true'.")
    if config.capture_step and (fabric.device.type != "cuda" or is_sharded(fabric) or config.precision == "16-mixed"):
        raise ConfigurationError(
            "capture_step=True needs a CUDA device, parameters that are not sharded, and no loss scaler (16-mixed): "
            "set capture_step=False."
        )
    fabric.launch()
    if fabric.world_size > 1:
        atexit.register(leave_group)
    if config.logits == "compute":
        # Fabric's wrapper turns every floating output into float32. The loss below does that by itself, and under
        # torch.compile without writing the float32 logits to memory.
        fabric.strategy.precision.convert_output = keep_dtype  # type: ignore[method-assign, assignment] # of this instance
    logger.info("logits: leave the model in %s", "float32" if config.logits == "float32" else "the computing dtype")
    return fabric


def sharding() -> Any:
    """FSDP with one unit per transformer block, as its paper has it (https://arxiv.org/abs/2304.11277)."""
    from lightning.fabric.strategies.fsdp import FSDPStrategy

    from reference.model import Block

    return FSDPStrategy(auto_wrap_policy={Block}, state_dict_type="full")


def leave_group() -> None:
    """Leave the process group before the interpreter ends.

    Fabric does so for NCCL only. Gloo's threads, still running when the process is torn down, abort it ("terminate
    called without an active exception", exit code 134) in about one run of five, after all was done.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def keep_dtype(output: Any) -> Any:
    """Fabric's conversion of the model's output, switched off."""
    return output


def is_sharded(fabric: "Fabric") -> bool:
    """Whether the strategy shards parameters over ranks, told without importing its module."""
    return type(fabric.strategy).__name__ in ("FSDPStrategy", "ModelParallelStrategy")
