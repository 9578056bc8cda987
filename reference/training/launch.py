"""Fabric, started as the configuration says: accelerator, ranks, strategy, precision."""

import atexit
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from reference.config import TrainConfig
from reference.errors import ConfigurationError
from reference.training.stopping import ended_by_signals

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("reference")


def launch(config: TrainConfig) -> "Fabric":
    """Start Fabric with the precision that was asked for, or refuse, and return it.

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
            strategy=choose_strategy(config),
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
    with waiting_for_nodes(config):
        fabric.launch()
    if fabric.world_size > 1:
        atexit.register(leave_group)
    if config.logits == "compute":
        # Fabric's wrapper turns every floating output into float32. The loss below does that by itself, and under
        # torch.compile without writing the float32 logits to memory.
        fabric.strategy.precision.convert_output = lambda output: output  # type: ignore[method-assign, assignment] # of this instance
    logger.info("logits: leave the model in %s", "float32" if config.logits == "float32" else "the computing dtype")
    return fabric


@contextlib.contextmanager
def waiting_for_nodes(config: TrainConfig) -> Iterator[None]:
    """Where there are several nodes, say once on each what it waits for, and let Ctrl-C end it meanwhile."""
    if config.num_nodes == 1:
        yield
        return
    with ended_by_signals():  # first, so that a Ctrl-C which answers the line below is heard
        if os.environ.get("LOCAL_RANK", "0") == "0":
            address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "chosen freely")
            node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
            logger.warning(
                "waiting for %d nodes of %d process(es) each at %s, port %s; this is node %s "
                "(set MASTER_ADDR, MASTER_PORT and NODE_RANK on each)",
                *(config.num_nodes, config.devices, address, port, node),
            )
        yield


def choose_strategy(config: TrainConfig) -> Any:
    """Return Fabric's strategy: its name, or one of ours. Their modules are imported only where they are used."""
    ranks = config.devices * config.num_nodes
    if config.strategy == "fsdp":
        from reference.training.sharding import ShardedStrategy

        return ShardedStrategy(ranks)
    if config.strategy in ("auto", "ddp") and config.compile and ranks > 1:
        from reference.training.replication import ReplicatedStrategy

        logger.info("gradients: averaged over the ranks at once, after the last backward, because compile is true")
        return ReplicatedStrategy()
    return config.strategy


def leave_group() -> None:
    """Leave the process group before the interpreter ends.

    Fabric does so for NCCL only. Gloo's threads, still running when the process is torn down, abort it ("terminate
    called without an active exception", exit code 134) in about one run of five, after all was done.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_sharded(fabric: "Fabric") -> bool:
    """Return whether the strategy shards parameters over ranks, told without importing its module."""
    return type(fabric.strategy).__name__ == "ShardedStrategy"


def reduce(fabric: "Fabric", tensor: Tensor, operation: Literal["sum", "mean"]) -> Tensor:
    """Return a tensor summed or averaged over all ranks, in place; as it is on a single one."""
    if fabric.world_size == 1:
        return tensor
    # NOTE a footgun: Fabric's own all_reduce begins with a barrier, in which the host waits for all that the GPU has to
    # do: twice in an update, and the GPU then waits for the host.
    torch.distributed.all_reduce(tensor)
    return tensor.div_(fabric.world_size) if operation == "mean" else tensor
