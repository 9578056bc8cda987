"""The state of an optimizer survives a file, and one that cannot belong to its tensors is refused."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from reference.model.gpt import GPT
from reference.optimizers import build_optimizer, load_optimizer_state, optimizer_state
from tests.reference.optimizers import CPU, OF_TORCH, gpt, take_steps

pytestmark = pytest.mark.filterwarnings(
    # grokadamw 0.1.2 opens torch.cuda.amp.autocast at every step: deprecated, and off without a GPU.
    "ignore:.*torch.cuda.amp.autocast:FutureWarning",
    "ignore:CUDA is not available:UserWarning",
)

OPTIMIZERS = ["torch.optim.AdamW", "grokadamw.GrokAdamW", "bitsandbytes.optim.AdamW8bit"]


def equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("path", OPTIMIZERS)
def test_state_survives_a_file(path: str) -> None:
    """Interrupted after two steps and continued from a file: the parameters of a run without interruption."""
    model = gpt(vocab_size=128, n_embd=64)  # large enough for 8-bit state
    optimizer = build_optimizer(path, {"lr": 0.01}, model, CPU)
    take_steps(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer_state(optimizer), file)
    file.seek(0)
    continued, forgetful = copy.deepcopy(model), copy.deepcopy(model)
    loaded, fresh = (build_optimizer(path, {"lr": 0.01}, each, CPU) for each in (continued, forgetful))
    load_optimizer_state(loaded, torch.load(file, weights_only=True))
    take_steps(model, optimizer, 2)
    take_steps(continued, loaded, 2)
    take_steps(forgetful, fresh, 2)
    assert equal(continued, model)
    assert not equal(forgetful, model)


def trained(path: str, dtype: torch.dtype = torch.float32) -> tuple[GPT, Optimizer]:
    model = gpt(vocab_size=128, n_embd=64).to(dtype)
    optimizer = build_optimizer(path, {}, model, CPU)
    take_steps(model, optimizer, 2)
    return model, optimizer


@pytest.mark.parametrize("name", OF_TORCH)
def test_state_survives_16_bit_weights(name: str) -> None:
    """NAdam's product of momenta is float32, and torch's load_state_dict rounds it to the parameter's dtype."""
    path = f"torch.optim.{name.partition(',')[0]}"
    model, optimizer = trained(path, torch.bfloat16)
    continued = copy.deepcopy(model)
    loaded = build_optimizer(path, {}, continued, CPU)
    load_optimizer_state(loaded, copy.deepcopy(optimizer_state(optimizer)))  # as from a file: it shares no memory
    take_steps(model, optimizer, 2)
    take_steps(continued, loaded, 2)
    assert equal(continued, model)


@pytest.mark.parametrize(
    ("path", "key", "damage", "sentence"),
    [
        ("torch.optim.AdamW", "exp_avg", lambda t: t[:-1], "exp_avg of tensor 0 has the shape (191, 64), but that"),
        ("torch.optim.AdamW", "exp_avg", lambda t: t.T, "exp_avg of tensor 0 has the shape (64, 192), but that tensor"),
        (
            "torch.optim.AdamW",
            "exp_avg_sq",
            lambda t: t.flatten(),
            "exp_avg_sq of tensor 0 has the shape (12288,),",
        ),
        ("torch.optim.AdamW", "exp_avg", lambda t: t.long(), "exp_avg of tensor 0 holds torch.int64, but must hold fl"),
        ("bitsandbytes.optim.AdamW8bit", "state1", lambda t: t[:-1], "state1 of tensor 0 has the shape (191, 64), but"),
    ],
)
def test_state_that_cannot_belong_to_its_tensor_is_refused(path: str, key: str, damage: Any, sentence: str) -> None:
    model, optimizer = trained(path)
    state = copy.deepcopy(optimizer_state(optimizer))
    entry = state["state"][0]
    entry = entry.get("__bnb_optimizer_quant_state__", entry)
    entry[key] = damage(entry[key])
    fresh = build_optimizer(path, {}, model, CPU)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_optimizer_state(fresh, state)
    assert not fresh.state


@pytest.mark.parametrize("path", OPTIMIZERS)
def test_loading_leaves_the_given_state_alone(path: str) -> None:
    model = gpt()
    optimizer = build_optimizer(path, {}, model, CPU)
    take_steps(model, optimizer, 1)
    keys = set(state := optimizer_state(optimizer))
    load_optimizer_state(build_optimizer(path, {}, model, CPU), state)
    assert set(state) == keys
