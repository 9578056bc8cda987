"""Head and loss computed together, with their gradients, in forward: the logits are read once less, and in pieces."""

from typing import Any

import torch
from torch import Tensor, nn

from reference.config import IGNORE
from reference.model.gpt import GPT
from reference.model.loss import TokenLoss


class LinearLoss(torch.autograd.Function):
    """The sum of cross entropies of a linear layer's outputs, whose gradients are ready after forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunks: int) -> Tensor:
        rows, narrow = hidden.flatten(0, -2).to(dtype), weight.to(dtype)
        columns = torch.arange(len(weight), device=weight.device)
        total = torch.zeros((), device=hidden.device)
        into_rows, into_weight = [], torch.zeros((), device=hidden.device)
        for part, wanted in zip(rows.chunk(chunks), targets.flatten().chunk(chunks), strict=True):
            logits = (part @ narrow.t()).float()
            level = logits.logsumexp(-1, keepdim=True)
            kept = wanted != IGNORE
            index = torch.where(kept, wanted, 0)[:, None]
            total = total + torch.where(kept, (level - logits.gather(-1, index))[:, 0], 0.0).sum()
            slope = (logits - level).exp() - (columns == index).float()
            slope = torch.where(kept[:, None], slope, 0.0).to(dtype)
            into_rows.append(slope @ narrow)
            into_weight = into_weight + (slope.t() @ part).float()
        ctx.save_for_backward(torch.cat(into_rows), into_weight)
        ctx.like = hidden.shape, hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        into_rows, into_weight = ctx.saved_tensors
        shape, dtype, weight_dtype = ctx.like
        rows = (into_rows.float() * gradient).to(dtype).view(shape)
        return rows, (into_weight * gradient).to(weight_dtype), None, None, None


class FusedLoss(TokenLoss):
    """A GPT and its loss, as TokenLoss, in ``chunks`` pieces."""

    def __init__(self, model: nn.Module, chunks: int) -> None:
        super().__init__(model)
        self.chunks = chunks

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(self.model, GPT)
        hidden = without_head(self.model, ids)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        loss: Tensor = LinearLoss.apply(hidden, self.model.head.weight, targets, dtype, self.chunks)
        return loss


def without_head(model: GPT, ids: Tensor) -> Tensor:
    """GPT.forward up to the head."""
    x = model.embedding(ids)
    if model.position is not None:
        x = x + model.position(torch.arange(ids.size(1), device=ids.device))
    if not model.config.fp32_residual and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for block in model.blocks:
        x = block(x, model.rotary)
    return model.norm(x)  # type: ignore[no-any-return] # a module's
