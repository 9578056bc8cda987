"""What the suite hands to a stack to see what it makes of it: optimizers and modules of somebody else's."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

# optimizers ------------------------------------------------------------------------------------------------------


class _GradientDescent(Optimizer):
    """Plain gradient descent; what differs between the probes is their constructor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override] # torch's overloads say float
        loss = None
        if closure is not None:  # Lightning computes the gradients in it
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
        return loss


class WithoutFused(_GradientDescent):
    """Accepts lr and weight_decay, and no ``fused``."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})


class AnyKeywords(_GradientDescent):
    """Accepts whatever comes and keeps it; a signature without names, as wrappers of optimizers have it."""

    def __init__(self, params: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(params, {"lr": 1e-3} | kwargs)


class NeedsHorizon(_GradientDescent):
    """Needs an argument of its own."""

    def __init__(self, params: Iterable[Any], lr: float, *, horizon: int) -> None:
        super().__init__(params, {"lr": lr, "horizon": horizon})


# modules ---------------------------------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """Norm with one gain (https://arxiv.org/abs/1910.05895); x-transformers calls it ``g`` too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.scale = width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.g

    def reset_parameters(self) -> None:
        nn.init.ones_(self.g)


class RMSNorm(nn.Module):
    """RMSNorm whose gain is called ``g`` and has two dimensions, so that no rule by ndim finds it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.g

    def reset_parameters(self) -> None:
        nn.init.ones_(self.g)


class MemoryTransformer(nn.Module):
    """One attention block with memory tokens and memory keys/values, named as in x-transformers.

    Its tensors are the ones that rules by name or by ndim put into the wrong group. One matrix is frozen.
    """

    vocab_size, width, heads, memories = 128, 32, 2, 2

    def __init__(self) -> None:
        super().__init__()
        width = self.width
        self.token_emb = nn.Embedding(self.vocab_size, width)
        self.pos_emb = nn.Parameter(torch.randn(64, width) * 0.02)
        self.memory_tokens = nn.Parameter(torch.randn(self.memories, width) * 0.02)
        self.mem_k = nn.Parameter(torch.randn(self.heads, self.memories, width // self.heads) * 0.02)
        self.mem_v = nn.Parameter(torch.randn(self.heads, self.memories, width // self.heads) * 0.02)
        self.pre = RMSNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=True)
        self.to_out = nn.Linear(width, width, bias=False)
        self.frozen = nn.Linear(width, width, bias=False)
        self.frozen.requires_grad_(False)
        self.final_norm = ScaleNorm(width)
        self.to_logits = nn.Linear(width, self.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        batch, time = ids.shape
        x = self.token_emb(ids) + self.pos_emb[:time]
        x = torch.cat((self.memory_tokens.expand(batch, -1, -1), x), dim=1)
        heads = self.to_qkv(self.pre(x)).view(batch, time + self.memories, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        k = torch.cat((self.mem_k.expand(batch, -1, -1, -1).to(k.dtype), k), dim=2)
        v = torch.cat((self.mem_v.expand(batch, -1, -1, -1).to(v.dtype), v), dim=2)
        # Position i sees the memories, which come first, and what is not after it.
        length = time + self.memories
        mask = torch.ones(length, length + self.memories, dtype=torch.bool, device=ids.device).tril(self.memories)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.to_out(y) + self.frozen(x)
        return self.to_logits(self.final_norm(x[:, self.memories :]))


DECAYED = frozenset({"to_qkv.weight", "to_out.weight", "to_logits.weight"})
"""The tensors of MemoryTransformer that multiply activations: only these decay under a policy by role."""


class EmbeddingOptions(nn.Module):
    """A table with every option an nn.Embedding has, and a head."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(
            128, 32, padding_idx=3, max_norm=1.5, norm_type=1.0, scale_grad_by_freq=not sparse, sparse=sparse
        )
        self.head = nn.Linear(32, 128)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(ids))
        return logits


class LostOnMeta(nn.Module):
    """Has a parameter of its own and no ``reset_parameters``: built on the meta device, its start is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 32)
        self.temperature_of_probe = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(32, 128)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(ids)) * self.temperature_of_probe
        return logits


def sparse_embedding() -> nn.Module:
    """EmbeddingOptions with sparse gradients."""
    return EmbeddingOptions(sparse=True)


OWN_START = {"table.weight": 0.25, "norm.weight": 0.5, "head.weight": 0.125, "head.bias": 0.75}
"""What OwnStart sets its parameters to."""


class OwnStart(nn.Module):
    """Sets its own start, to values that no rule of initialisation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(128, 32), nn.LayerNorm(32, bias=False), nn.Linear(32, 128)
        for name, value in OWN_START.items():
            nn.init.constant_(self.get_parameter(name), value)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.table(ids)))
        return logits
