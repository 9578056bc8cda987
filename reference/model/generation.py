"""Text from a trained model, one token after the other."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from reference.errors import ConfigurationError, TrainingError
from reference.model.gpt import GPT, Cache
from reference.model.modes import evaluation_mode


def generate(
    model: nn.Module,
    prompt: Sequence[int] | Tensor,
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    end: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, and yield each new token id as soon as it is drawn.

    Keys and values are kept in a cache, so that each token costs one step of the model over that token alone. When
    prompt and continuation have filled block_size, the last half of them is read again from position 0, and the
    continuation goes on from there: what lies before is forgotten. Dropout is off; the modes of the modules, the
    gradient mode and PyTorch's own random state are as they were whenever a token is yielded.

    Args:
        model: a reference.GPT, on any device and in any dtype.
        prompt: token ids, (T,), at least one and at most block_size.
        tokens: how many to generate at most.
        temperature: divides the logits. 0: always the most probable token (greedy), nothing is drawn.
        top_k: draw from the k most probable tokens only. None: from all.
        top_p: draw from the smallest set of most probable tokens whose probabilities, after temperature and top_k,
            sum to at least p (nucleus sampling, https://arxiv.org/abs/1904.09751). None: from all.
        seed: decides what is drawn. Draws are made on the CPU, so they depend on the device only through the
            rounding of the logits. None: another continuation each time.
        end: stop when this token is drawn, without yielding it; usually the tokenizer's end of document.
        vocab_size: yield ids below it only: the tokenizer's, where the model's vocabulary is padded beyond that.

    Raises:
        ConfigurationError: if the prompt or a setting cannot work. Raised here, before the first token is asked for.
        TrainingError: if the logits are not finite.
    """
    if not isinstance(model, GPT):
        raise ConfigurationError(
            f"generate() needs a reference.GPT, for its cache of keys and values, not {type(model).__name__}."
        )
    check_settings(tokens, temperature, top_k, top_p, vocab_size, seed)
    ids = check_prompt(prompt, model.config.vocab_size, model.config.block_size)
    generator = torch.Generator()
    if seed is None:
        generator.seed()  # a new generator always starts from the same seed
    else:
        generator.manual_seed(seed)

    def choose(logits: Tensor) -> int:
        return draw(logits[:vocab_size], temperature, top_k, top_p, generator)

    return stream(model, ids, tokens, choose, end)


def check_settings(
    tokens: int, temperature: float, top_k: int | None, top_p: float | None, vocab_size: int | None, seed: int | None
) -> None:
    """Raise ConfigurationError if a setting of :func:`generate` is out of its range."""
    rules = {
        f"tokens is {tokens}, but must be at least 0.": tokens >= 0,
        f"temperature is {temperature}: give 0 for greedy, or a positive number.": 0.0 <= temperature < math.inf,
        f"top_k is {top_k}: give a number of tokens of at least 1, or None for all.": top_k is None or top_k >= 1,
        f"top_p is {top_p}: give a probability above 0 and up to 1, or None.": top_p is None or 0.0 < top_p <= 1.0,
        f"vocab_size is {vocab_size}: give the tokenizer's, or None for the model's.": vocab_size is None
        or vocab_size >= 1,
        f"seed is {seed}: give a number of 64 bits that is not negative, or None.": 0 <= (seed or 0) < 1 << 64,
    }
    for sentence, holds in rules.items():
        if not holds:
            raise ConfigurationError(sentence)


def check_prompt(prompt: Sequence[int] | Tensor, vocab_size: int, block_size: int) -> list[int]:
    """Return the prompt as a list of token ids.

    Raises:
        ConfigurationError: if it is empty, too long, or holds an id that the model has no embedding for.
    """
    if isinstance(prompt, str):  # type: ignore[unreachable] # it is a sequence, too
        raise ConfigurationError("the prompt is text: encode it with the model's tokenizer.")
    if isinstance(prompt, Tensor) and (prompt.ndim != 1 or prompt.is_floating_point()):
        raise ConfigurationError(f"the prompt is a {tuple(prompt.shape)} tensor of {prompt.dtype}: give ids (T,).")
    ids = [int(token) for token in prompt]
    if not ids:
        raise ConfigurationError("the prompt is empty: give at least one token, such as the end of a document.")
    if len(ids) > block_size:
        raise ConfigurationError(
            f"the prompt has {len(ids)} tokens, but the model sees {block_size} (block_size): "
            f"give its last {block_size} tokens."
        )
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigurationError(
            f"the prompt has the token {wrong}, but the model's vocabulary ends at {vocab_size - 1}: "
            "encode it with the tokenizer that the model was trained with."
        )
    return ids


def stream(model: GPT, ids: list[int], tokens: int, choose: Callable[[Tensor], int], end: int | None) -> Iterator[int]:
    """Yield the tokens of :func:`generate`; ``choose`` takes one by the logits (V,)."""
    block_size = model.config.block_size
    size = min(block_size, len(ids) + tokens)
    cache, unread = model.new_cache(size), ids
    for _ in range(tokens):
        if cache[0].length + len(unread) > size:  # full: go on with the last half, read anew
            cache, unread = model.new_cache(size), ids[-max(1, block_size // 2) :]
        logits = read(model, unread, cache)
        if not logits.isfinite().all():
            raise TrainingError(
                "the logits are not finite: the weights hold values that are not, or their dtype is too narrow. "
                "Take an earlier checkpoint, or compute in float32."
            )
        token = choose(logits)
        if token == end:
            return
        ids = [*ids[-block_size:], token]
        unread = [token]
        yield token


# NOTE a footgun: a generator must not hold no_grad() or eval mode over a yield, or they leak to whoever reads it.
@torch.no_grad()
def read(model: GPT, ids: list[int], cache: list[Cache]) -> Tensor:
    """Read more tokens and return the logits (V,) of the token after the last one, float64 on the CPU."""
    with evaluation_mode(model):
        logits = model(torch.tensor([ids], device=model.head.weight.device), cache)
    return logits[0, -1].cpu().double()


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """Draw a token by logits (V,), float64: temperature, then top_k, then top_p. At temperature 0 the first maximum."""
    if temperature == 0.0:
        return int(logits.argmax())
    # Sorted, so that both cuts are slices. Stable, so that a tie is cut in the same place everywhere.
    ordered, tokens = logits.sort(descending=True, stable=True)
    # Relative to the largest, so that a tiny temperature gives -inf and not NaN.
    probabilities = ((ordered[:top_k] - ordered[0]) / temperature).softmax(dim=0)
    if top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities  # of all tokens that are more probable
        probabilities = probabilities[before < top_p]
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
