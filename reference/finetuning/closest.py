"""StableEmbedding in front of a trained table: the norm's gain and shift that change the table least.

The norm makes all rows equally long, so no gain and shift can keep a table whose rows are not. What remains is told.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def fit_norm(stable: nn.Embedding) -> float:
    """Set gain and shift of a StableEmbedding's norm so that its rows come closest to those of its table.

    Channel by channel this is a line through (normed value, table's value) over all rows, by least squares.

    Returns:
        The Frobenius norm of what is left between the normed table and the table, over that of the table.
    """
    norm = stable.norm
    assert isinstance(norm, nn.LayerNorm)
    table = stable.weight.detach().float()  # (V, C)
    rows = F.layer_norm(table, (table.size(1),), eps=norm.eps)
    centred = rows - rows.mean(0)
    spread = centred.square().sum(0)
    gain = torch.where(spread > 0, (centred * table).sum(0) / spread.clamp(min=1e-30), 0.0)
    norm.weight.copy_(gain)
    norm.bias.copy_(table.mean(0) - gain * rows.mean(0))
    return relative_error(rows * norm.weight.float() + norm.bias.float(), table)


def relative_error(seen: Tensor, wanted: Tensor) -> float:
    """Return the Frobenius norm of a difference over that of what was wanted."""
    return float((seen - wanted).norm() / wanted.norm().clamp(min=1e-30))
