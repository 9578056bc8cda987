"""transformers: the first update of every warm-up has a learning rate of zero, and the last is not at the end.

Trains five updates with the Trainer and prints, for each, its learning rate and by how much the weights moved.
"""

import contextlib
import io
import tempfile

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging


def weights(optimizer):
    return torch.cat([p.detach().flatten().clone() for group in optimizer.param_groups for p in group["params"]])


before, steps = [], []
register_optimizer_step_pre_hook(lambda optimizer, *_: before.append(weights(optimizer)))
register_optimizer_step_post_hook(
    lambda optimizer, *_: steps.append(
        (optimizer.param_groups[0]["lr"], (weights(optimizer) - before[-1]).abs().sum().item())
    )
)
logging.set_verbosity_error()
torch.manual_seed(1)
data = [{"input_ids": row, "labels": row} for row in torch.randint(128, (40, 16))]
run = {"use_cpu": True, "max_steps": 5, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
for kind in ("linear", "cosine", "constant_with_warmup", "warmup_stable_decay"):
    steps.clear()
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=128, bos_token_id=0, eos_token_id=0))
    extra = {"num_decay_steps": 1} if kind == "warmup_stable_decay" else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = TrainingArguments(folder, warmup_steps=3, lr_scheduler_type=kind, lr_scheduler_kwargs=extra, **run)
        Trainer(model, options, train_dataset=data).train()
    rates, moved = ([f"{value:.4f}" for value in column] for column in zip(*steps, strict=True))
    print(f"{kind:20} rates {', '.join(rates)}; the first update moved the weights by {moved[0]}")
