"""Data-parallel runs whose loss is compiled: gradients are averaged once, after the last backward of an update.

PyTorch's DistributedDataParallel sends gradients while backward still computes others. A compiled backward hands over
all of its gradients at its end, so nothing overlaps. Worse, where DistributedDataParallel meets torch.compile it cuts
the graph at every 25 MB of parameters (torch._dynamo.config.optimize_ddp), and copies every gradient into a bucket and
back. Here the graph stays whole, and what is left is the exchange itself (docs/trainer.md has the figures).

Kept from DistributedDataParallel: rank 0's weights and buffers are everybody's, a parameter that only some ranks used
gets the average, one that no rank used gets no gradient, and the average is the same, bit for bit, on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import distributed, nn

from reference.errors import ConfigurationError

PIECE = 32 * 2**20
"""Elements that travel together: 128 MB in float32. While one piece is on its way, the next is put together."""


class ReplicatedStrategy(DDPStrategy):
    """Fabric's strategy for DDP, without DistributedDataParallel."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override] # nothing is wrapped around it
        """Give every rank the weights and buffers of rank 0.

        Raises:
            ConfigurationError: if a parameter has sparse gradients.
        """
        sparse = [name for name, part in module.named_modules() if getattr(part, "sparse", False)]
        if sparse:
            raise ConfigurationError(
                f"{', '.join(sparse)} has sparse gradients, which several ranks cannot average where the loss is "
                "compiled: set sparse=False there, or compile=False."
            )
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor.detach(), src=0)
        self._backward_sync_control = AverageAtTheEnd(module)  # type: ignore[assignment] # Fabric names its class
        return module


class AverageAtTheEnd(_BackwardSyncControl):
    """What ``fabric.no_backward_sync`` does under :class:`ReplicatedStrategy`."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Not those that are no part of a checkpoint, such as the tables of rotary positions: every rank has the same.
        kept = module.state_dict(keep_vars=True)
        self.buffers = [buffer for name, buffer in module.named_buffers() if name in kept]

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Run a forward and a backward, and after it average the gradients over all ranks, unless ``enabled``."""
        yield
        if not enabled:  # not reached if backward has raised
            average_gradients(self.parameters)
            for buffer in self.buffers:
                distributed.broadcast(buffer, src=0)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients of all ranks, in place. Every rank must call it, with the same parameters.

    A rank that lacks the gradient of a parameter adds zeros, and gets the average if any rank has one. Only on such a
    rank does the host wait for the device.
    """
    lacking = [number for number, parameter in enumerate(parameters) if parameter.grad is None]
    used = torch.ones(len(parameters), device=parameters[0].device)  # by how many ranks
    for number in lacking:
        used[number] = 0.0
        parameters[number].grad = torch.zeros_like(parameters[number])
    counted = distributed.all_reduce(used, async_op=True)
    before: Travelling | None = None
    for piece in pieces(parameters):
        now = Travelling(piece)
        if before is not None:
            before.arrive()
        before = now
    if before is not None:
        before.arrive()
    counted.wait()
    if lacking:
        by_ranks = used.tolist()
        for number in lacking:
            if by_ranks[number] == 0:
                parameters[number].grad = None


class Travelling:
    """Gradients on their way between the ranks, as one flat tensor."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        """Put the gradients together and send them."""
        self.gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.flat = torch.cat([gradient.flatten() for gradient in self.gradients]).div_(distributed.get_world_size())
        self.work = distributed.all_reduce(self.flat, async_op=True)

    def arrive(self) -> None:
        """Put the averages into the gradients. On a GPU the stream waits for them, not the host."""
        self.work.wait()
        parts = self.flat.split([gradient.numel() for gradient in self.gradients])
        whole = [part.view(gradient.shape) for part, gradient in zip(parts, self.gradients, strict=True)]
        torch._foreach_copy_(self.gradients, whole)


def pieces(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in groups of one dtype and some :data:`PIECE` elements, the same on all ranks."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        piece: list[nn.Parameter] = []
        size = 0
        for parameter in parameters:
            if parameter.dtype == dtype:
                piece.append(parameter)
                size += parameter.numel()
                if size >= PIECE:
                    yield piece
                    piece, size = [], 0
        if piece:
            yield piece
