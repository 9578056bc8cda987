"""A script with its settings as globals, run from its text with some of them replaced: optimizer and seed are fixed."""

from typing import Any

from conformance import Recipe, everything_but
from tests.stacks import gpt

SCRIPT = """
import torch
from torch.nn import functional as F
from tests.stacks.gpt import GPT

vocab_size, block_size, n_embd, n_layer, n_head = 50257, 1024, 768, 12, 12
learning_rate, min_lr, warmup_iters, max_iters = 6e-4, None, 2000, 600000
weight_decay, grad_clip, gradient_accumulation_steps = 0.1, 0.0, 1
globals().update(overrides)  # as nanoGPT's configurator does

torch.manual_seed(1337)
model = GPT(vocab_size, block_size, n_embd, n_layer, n_head, dropout=0.0, tied=True)
decay = [p for p in model.parameters() if p.dim() >= 2]
nodecay = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": decay, "weight_decay": weight_decay}, {"params": nodecay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))

for it in range(max_iters):
    lr = get_lr(it)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for micro_step in range(gradient_accumulation_steps):
        X, Y = get_batch()
        loss = F.cross_entropy(model(X).view(-1, vocab_size), Y.reshape(-1)) / gradient_accumulation_steps
        loss.backward()
    if grad_clip != 0.0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
"""
FAULTS = {
    "the head is not tied": ("tied=True", "tied=False"),
    "every microbatch steps": (
        "        loss.backward()\n",
        "        loss.backward()\n        optimizer.step()\n        optimizer.zero_grad()\n",
    ),
}


class Script:
    name, version, policy = "script of globals", "1", gpt.Policy()
    claimed = ("gpt-shape", "tied", "microbatches", "clip", "schedule")
    lacks = everything_but(*claimed, reason="the script has no such global")
    lacks |= {"any-optimizer": "AdamW is written there", "keywords": "betas are written there", "seed": "it is 1337"}
    lacks["untied"] = "the head is always tied"

    def __init__(self, fault: str = "") -> None:
        self.text = SCRIPT.replace(*FAULTS[fault]) if fault else SCRIPT

    def train(self, recipe: Recipe) -> None:
        data = iter(recipe.batches())

        def get_batch() -> tuple[object, object]:
            batch = next(data)
            return batch[:, :-1], batch[:, 1:]

        overrides: dict[str, Any] = {
            "vocab_size": recipe.vocab_size,
            "block_size": recipe.block_size,
            "n_embd": recipe.n_embd,
        }
        overrides |= {"n_layer": recipe.n_layer, "n_head": recipe.n_head, "max_iters": recipe.updates}
        overrides |= {"gradient_accumulation_steps": recipe.microbatches, "grad_clip": recipe.clip or 0.0}
        overrides |= {key: value for key, value in recipe.optimizer.arguments if key == "weight_decay"}
        get_lr = lambda it: self.policy.learning_rate(recipe, it)  # noqa: E731 # a one-line global, as in the script
        exec(compile(self.text, "train.py", "exec"), {"overrides": overrides, "get_batch": get_batch, "get_lr": get_lr})
