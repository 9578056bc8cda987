"""The loss: cross entropy in nats, summed over tokens, beside the model or inside one compiled graph with it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reference.config import IGNORE
from reference.errors import TrainingError


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross entropies in nats, in float32 whatever the logits' dtype.

    In bfloat16 the loss itself would be rounded, to steps of 0.06 around 11 (Modalities#464).

    Args:
        logits: (B, T, V), floating.
        targets: (B, T), int64; -100 is ignored.

    Raises:
        TrainingError: if the model gave anything but such logits.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TrainingError(
            f"the model gave {form} for targets {tuple(targets.shape)}: it must map token ids (B, T) to logits "
            "(B, T, V), a single tensor."
        )
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


class TokenLoss(nn.Module):
    """A model and its loss as one module, (B, T) ids and targets to a scalar: for torch.compile.

    With the loss inside the compiled graph the float32 logits are never written to memory: for GPT-2's vocabulary
    they are 13 GB of a microbatch of 64 x 1024 tokens.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = token_loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """See :func:`token_loss`."""
        return self.loss(self.model(ids), targets)


def batch_loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross entropies of a batch, from a model with or without its loss inside."""
    if isinstance(getattr(model, "module", model), TokenLoss):  # Fabric's wrapper shows the module it was given
        return model(ids, targets)
    return token_loss(model(ids), targets)
