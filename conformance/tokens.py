"""The token ids of recipes: random, and the same in every process. Each function imports torch when it is called."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Alteration = Literal[
    "later tokens", "first token", "other sequences", "equal sequences", "exchanged tokens", "unknown token"
]
DATA_SEED = 20240229  # of the token ids; another than Recipe.seed, which decides the weights only


def random_ids(low: int, high: int, shape: tuple[int, ...], stream: int) -> "torch.Tensor":
    """Return random ids from ``low`` up to ``high - 1``, int64. Each stream of a recipe has other ones."""
    import torch

    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(DATA_SEED + stream))


def alter(tokens: "torch.Tensor", how: Alteration, vocab_size: int) -> "torch.Tensor":
    """Change some of the sequences (N, block_size + 1) in place, and return them."""
    half, last = (tokens.size(1) - 1) // 2, tokens.size(1) - 2
    places = {"later tokens": tokens[:, half:], "first token": tokens[:, :1], "other sequences": tokens[1::2]}
    if how == "equal sequences":
        tokens[1:] = tokens[:1].clone()
    elif how == "exchanged tokens":
        tokens[:, [last - 2, last - 1]] = tokens[:, [last - 1, last - 2]]
    elif how == "unknown token":
        tokens[0, half] = vocab_size
    else:
        places[how].add_(1).remainder_(vocab_size)
    return tokens


def ignore_some(tokens: "torch.Tensor", stream: int) -> "torch.Tensor":
    """Return the sequences with -100 for another share of the tokens of each, but never for all of its targets."""
    import torch

    generator = torch.Generator().manual_seed(DATA_SEED + stream)
    kept = torch.rand(len(tokens), 1, generator=generator) * 0.9 + 0.1
    ignored = torch.rand(tokens.shape, generator=generator) > kept
    ignored[:, 1] = False
    return tokens.masked_fill(ignored, -100)


def ignore_stretches(rows: "torch.Tensor", block_size: int, stream: int) -> "torch.Tensor":
    """Return samples that were cut from one document with -100 for every second stretch of two to five tokens.

    The last token, which ends the document, is a target.
    """
    import torch

    generator = torch.Generator().manual_seed(DATA_SEED + stream)
    lengths = torch.randint(2, 6, (rows.numel(),), generator=generator)
    kept = (torch.arange(len(lengths)) % 2).repeat_interleave(lengths)[: len(rows) * block_size + 1].bool()
    kept[-1] = True
    return rows.masked_fill(~kept.unfold(0, block_size + 1, block_size), -100)
