"""Generation: the same tokens as without a cache, deterministic by seed, cut as asked for, and what it refuses."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference.config import GPTConfig
from reference.errors import ConfigurationError, TrainingError
from reference.model.generation import draw, generate
from reference.model.gpt import GPT

TINY: dict[str, Any] = {"vocab_size": 17, "block_size": 8, "n_layer": 2, "n_head": 4, "n_embd": 16, "init_std": 0.4}
SHAPES = {
    "gpt2": GPTConfig.gpt2(**TINY, dropout=0.5, tie_embeddings=False),  # tied, it tends to repeat a token
    "llama-grouped": GPTConfig.llama(**TINY, n_kv_head=2),
    "one-token-of-context": GPTConfig.gpt2(**TINY | {"block_size": 1}, tie_embeddings=False),
}


def without_cache(model: GPT, prompt: list[int], tokens: int, window: int) -> list[int]:
    """Greedy, all read again for each token; when block_size is full, from its last ``window`` tokens on."""
    ids, start = list(prompt), 0
    for _ in range(tokens):
        if len(ids) - start > model.config.block_size:
            start = len(ids) - window
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 5, 8])
def test_greedy_tokens_are_those_without_a_cache(config: GPTConfig, length: int) -> None:
    model = GPT(config).eval()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6][: min(length, config.block_size)]
    found = list(generate(model, prompt, tokens=30, temperature=0.0))
    assert found == without_cache(model, prompt, 30, max(1, config.block_size // 2))
    assert len(set(found)) > 1, "a constant continuation proves little"
    assert list(generate(model, torch.tensor(prompt), tokens=30, temperature=0.0, seed=1)) == found


def test_the_model_reads_each_token_once() -> None:
    model = GPT(SHAPES["gpt2"])
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].size(1)))
    assert len(list(generate(model, [1, 2, 3], tokens=10))) == 10
    assert lengths == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1], "the prompt, then one by one, and the last half when full"


def test_a_short_continuation_takes_a_small_cache() -> None:
    model = GPT(GPTConfig.gpt2(**TINY | {"block_size": 1000}))
    caches: list[Any] = []
    model.register_forward_pre_hook(lambda _, arguments: caches.append(arguments[1]))
    assert len(list(generate(model, [1, 2, 3], tokens=5))) == 5
    assert {cache.size for cache in itertools.chain(*caches)} == {8}


def test_a_seed_decides_and_nothing_else_does() -> None:
    model = GPT(SHAPES["gpt2"])
    torch.manual_seed(1)
    first = list(generate(model, [1], tokens=40, seed=7))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert list(generate(model, [1], tokens=40, seed=7)) == first
    assert torch.equal(torch.get_rng_state(), state), "PyTorch's own random state was used"
    assert list(generate(model, [1], tokens=40, seed=8)) != first
    assert list(generate(model, [1], tokens=40)) != list(generate(model, [1], tokens=40))


def test_it_streams_and_leaves_modes_alone() -> None:
    model = GPT(SHAPES["gpt2"])
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokens = generate(model, [1], tokens=1000)
    assert not calls
    for count in (1, 2, 3):
        assert isinstance(next(tokens), int)
        assert len(calls) == count
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes


def test_it_stops_before_the_end() -> None:
    model = GPT(SHAPES["gpt2"]).eval()
    tokens = list(generate(model, [1], tokens=30, seed=5))
    end = tokens[9]
    assert list(generate(model, [1], tokens=30, seed=5, end=end)) == tokens[: tokens.index(end)]
    assert list(generate(model, [1], tokens=0)) == []


def test_ids_beyond_the_tokenizer_are_never_given() -> None:
    model = GPT(SHAPES["gpt2"])
    assert max(generate(model, [16], tokens=200, seed=0)) > 4
    assert max(generate(model, [16], tokens=200, seed=0, vocab_size=5)) == 4
    assert max(generate(model, [16], tokens=20, temperature=0.0, vocab_size=5)) <= 4


LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()[torch.tensor([2, 0, 3, 1])]
# so the tokens by probability are 1 (a half), 3 (a quarter), 0 and 2 (an eighth each)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {1: 0.5, 3: 0.25, 0: 0.125, 2: 0.125}),
        ({"temperature": 0.5}, {1: 16 / 22, 3: 4 / 22, 0: 1 / 22, 2: 1 / 22}),  # probabilities squared
        ({"temperature": 1e9}, {1: 0.25, 3: 0.25, 0: 0.25, 2: 0.25}),
        ({"temperature": 1e-320}, {1: 1.0}),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 99}, {1: 0.5, 3: 0.25, 0: 0.125, 2: 0.125}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.6}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.8}, {1: 4 / 7, 3: 2 / 7, 0: 1 / 7}),  # of the tie, the first
        ({"top_p": 1.0}, {1: 0.5, 3: 0.25, 0: 0.125, 2: 0.125}),
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),  # of the two thirds and one third that top_k leaves
        ({"temperature": 0.5, "top_p": 0.6}, {1: 1.0}),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, Any], expected: dict[int, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    arguments = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": generator} | settings
    count = 4000
    drawn = [draw(LOGITS, **arguments) for _ in range(count)]
    assert set(drawn) == set(expected)
    for token, probability in expected.items():
        deviation = math.sqrt(probability * (1 - probability) / count)
        assert abs(drawn.count(token) / count - probability) <= 4 * deviation


def test_all_tokens_equal_gives_the_first() -> None:
    assert draw(torch.zeros(9), 0.0, None, None, torch.Generator()) == 0


@pytest.mark.parametrize(
    ("prompt", "changes", "sentence"),
    [
        ([], {}, "the prompt is empty: give at least one token, such as the end of a document."),
        ("abc", {}, "the prompt is text: encode it with the model's tokenizer."),
        ([1] * 9, {}, "the prompt has 9 tokens, but the model sees 8 (block_size): give its last 8 tokens."),
        ([1, 17], {}, "the prompt has the token 17, but the model's vocabulary ends at 16: encode it with the"),
        ([1, -1], {}, "the prompt has the token -1, but the model's vocabulary ends at 16"),
        (torch.ones(1, 3, dtype=torch.long), {}, "the prompt is a (1, 3) tensor of torch.int64: give ids (T,)."),
        (torch.ones(3), {}, "the prompt is a (3,) tensor of torch.float32: give ids (T,)."),
        ([1], {"tokens": -1}, "tokens is -1, but must be at least 0."),
        ([1], {"temperature": -0.5}, "temperature is -0.5: give 0 for greedy, or a positive number."),
        ([1], {"temperature": math.nan}, "temperature is nan: give 0 for greedy, or a positive number."),
        ([1], {"temperature": math.inf}, "temperature is inf: give 0 for greedy, or a positive number."),
        ([1], {"top_k": 0}, "top_k is 0: give a number of tokens of at least 1, or None for all."),
        ([1], {"top_p": 0.0}, "top_p is 0.0: give a probability above 0 and up to 1, or None."),
        ([1], {"top_p": 1.5}, "top_p is 1.5: give a probability above 0 and up to 1, or None."),
        ([1], {"vocab_size": 0}, "vocab_size is 0: give the tokenizer's, or None for the model's."),
        ([1], {"seed": 1 << 64}, "seed is 18446744073709551616: give a number of 64 bits that is not negative"),
        ([1], {"seed": -1}, "seed is -1: give a number of 64 bits that is not negative, or None."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_work_is_refused_before_the_first_token(
    prompt: list[int] | Tensor, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        generate(GPT(SHAPES["gpt2"]), prompt, **{"tokens": 1} | changes)


def test_another_module_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"needs a reference\.GPT, for its cache .* not Linear\."):
        generate(nn.Linear(2, 2), [1], tokens=1)


def test_logits_that_are_not_finite() -> None:
    model = GPT(SHAPES["gpt2"])
    with torch.no_grad():
        model.norm.get_parameter("weight")[0] = math.nan
    with pytest.raises(TrainingError, match=r"the logits are not finite: .* Take an earlier checkpoint, or compute in"):
        next(generate(model, [1], tokens=1))
