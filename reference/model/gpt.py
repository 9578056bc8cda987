"""GPT in one file: GPT-2 and Llama shapes from one config.

Sources: GPT-2 (Radford et al. 2019), Llama (https://arxiv.org/abs/2302.13971), rotary positions
(https://arxiv.org/abs/2104.09864), SwiGLU (https://arxiv.org/abs/2002.05202), grouped-query
attention (https://arxiv.org/abs/2305.13245).

Shapes: B batch, T time, V vocabulary, C n_embd, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reference.config import GPTConfig
from reference.model.initialization import NoDefaultInitialization, initialize


class Rotary(nn.Module):
    """Tables of cos and sin for rotary positions, (T, D) each, in the halves convention of GPT-NeoX and Llama."""

    cos: Tensor
    sin: Tensor

    def __init__(self, block_size: int, head_size: int, theta: float) -> None:
        super().__init__()
        self.block_size, self.head_size, self.theta = block_size, head_size, theta
        self.register_buffer("cos", torch.empty(block_size, head_size), persistent=False)
        self.register_buffer("sin", torch.empty(block_size, head_size), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the tables. They are buffers, but materialising from the meta device loses them just the same."""
        # NOTE a footgun: the phase must be float32 whatever the model's dtype. In bfloat16 positions beyond 256
        # collide (transformers#25681, gpt-neox#1003), so only the finished cos and sin may be rounded.
        device = self.cos.device
        exponent = torch.arange(0, self.head_size, 2, device=device, dtype=torch.float32) / self.head_size
        position = torch.arange(self.block_size, device=device, dtype=torch.float32)
        phase = torch.outer(position, self.theta**-exponent).repeat(1, 2)  # (T, D)
        self.cos.copy_(phase.cos())
        self.sin.copy_(phase.sin())

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Turn (B, heads, T, D) by position; the first of the T tokens stands at position ``start``."""
        end = start + x.size(-2)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * self.cos[start:end].to(x.dtype) + turned * self.sin[start:end].to(x.dtype)


class Cache:
    """Keys and values that one attention has computed, so that the next tokens need not compute them again.

    Memory is taken once, at the first tokens, in their batch size, device and dtype: (B, K, size, D) twice.
    It is for use under ``torch.no_grad()``: writing in place would invalidate what backward needs.
    """

    def __init__(self, size: int) -> None:
        """Make an empty cache.

        Args:
            size: tokens that it can hold.
        """
        self.size, self.length = size, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, K, T, D) of the next T tokens and return those of all tokens so far.

        Raises:
            ValueError: if they do not fit in.
        """
        end = self.length + k.size(2)
        if end > self.size:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.size}: start with a new one.")
        if self.keys is None or self.values is None:
            batch, heads, _, width = k.shape
            self.keys, self.values = (part.new_empty(batch, heads, self.size, width) for part in (k, v))
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention with H query heads and K key/value heads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.dropout = config.dropout
        width = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.qkv = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotary: Rotary | None, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C). With a cache the T tokens follow those in it, and see them."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_size).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        past = 0 if cache is None else cache.length
        if rotary is not None:
            q, k = rotary(q, past), rotary(k, past)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, past + T, D)
        # NOTE a footgun: is_causal aligns the first query with the first key (pytorch#108108), which is wrong behind
        # a past. One token sees everything and needs no mask.
        mask = None
        if past > 0 and time > 1:
            mask = torch.ones(time, past + time, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            # NOTE a footgun: SDPA drops whenever dropout_p > 0, also in eval mode (nanoGPT#240, pytorch#124464).
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=past == 0,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return self.proj(y.transpose(1, 2).reshape(batch, time, width))


class GeluMLP(nn.Module):
    """The MLP of GPT-2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.proj = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class SwigluMLP(nn.Module):
    """The gated MLP of Llama."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.fc = nn.Linear(config.n_embd, config.hidden_size, bias=config.bias)
        self.proj = nn.Linear(config.hidden_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.proj(F.silu(self.gate(x)) * self.fc(x))


class Block(nn.Module):
    """Norm, attention, norm, MLP, each sublayer added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = build_norm(config)
        self.attention = Attention(config)
        self.norm_mlp = build_norm(config)
        self.mlp: nn.Module = GeluMLP(config) if config.mlp == "gelu" else SwigluMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Rotary | None, cache: Cache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm_attention(x), rotary, cache))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class GPT(nn.Module):
    """Decoder-only transformer: token ids (B, T) to logits (B, T, V)."""

    checkpoint_blocks: bool = False
    """In training, keep only each block's input, and compute the block again in backward: less memory, the same
    gradients bit for bit (https://arxiv.org/abs/1604.06174)."""

    def __init__(self, config: GPTConfig, seed: int = 1337) -> None:
        """Build and initialise (reference.model.initialization holds the table).

        Args:
            config: the shape.
            seed: decides every weight, whatever the device, the dtype and the order of construction.
        """
        super().__init__()
        self.config = config
        with NoDefaultInitialization():
            self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
            self.position = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
            self.rotary = (
                Rotary(config.block_size, config.head_size, config.rope_theta) if config.position == "rotary" else None
            )
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.norm = build_norm(config)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        initialize(self, config, seed)

    def forward(self, ids: Tensor, cache: Sequence[Cache] | None = None) -> Tensor:
        """Map token ids (B, T), any integer dtype, to logits (B, T, V) in the dtype of the computation.

        Args:
            ids: the tokens; with a cache, those that follow the tokens in it.
            cache: from :meth:`new_cache`, for decoding: it remembers these tokens too.

        Raises:
            ValueError: if T, with the tokens in the cache, exceeds config.block_size or the cache's size.
        """
        start = cache[0].length if cache else 0
        end = start + ids.size(1)
        if end > self.config.block_size:
            raise ValueError(
                f"the sequence has {end} tokens, but block_size is {self.config.block_size}: "
                "shorten it or build the model with a larger block_size."
            )
        x = self.embedding(ids.long())  # (B, T, C); token files are often 16 bits wide
        if self.position is not None:
            x = x + self.position(torch.arange(start, end, device=ids.device))
        x = self.dropout(x)
        if not self.config.fp32_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        caches: Sequence[Cache | None] = cache or [None] * len(self.blocks)
        for block, kept in zip(self.blocks, caches, strict=True):
            if self.checkpoint_blocks and self.training and kept is None:
                # preserve_rng_state is the default: without it dropout differs when computed again (OLMo-core#828).
                x = checkpoint(block, x, self.rotary, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, self.rotary, kept)
        return self.head(self.norm(x))

    def new_cache(self, size: int | None = None) -> list[Cache]:
        """Return an empty cache for each block, to hold ``size`` tokens (None: block_size)."""
        return [Cache(self.config.block_size if size is None else size) for _ in self.blocks]


def build_norm(config: GPTConfig) -> nn.Module:
    """Return LayerNorm or RMSNorm, as the config says."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
