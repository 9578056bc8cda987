"""transformers: with dropout, how often one evaluates decides which weights one gets.

Trains the same GPT-2, from the same seed on the same data in the same order, with evaluations and without, and compares
the weights. Then asks what an evaluation does to torch's global random state, which dropout draws from.
"""

import contextlib
import io
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

logging.set_verbosity_error()
set_seed(1)
data = [{"input_ids": row, "labels": row} for row in torch.randint(128, (64, 16))]
sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
run = {"use_cpu": True, "max_steps": 4, "save_strategy": "no", "disable_tqdm": True, "seed": 1, "learning_rate": 1e-2}


def trained(dropout: float, **evaluation) -> torch.Tensor:
    config = GPT2Config(**sizes, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options, rows = TrainingArguments(folder, **run, **evaluation), {"train_dataset": data[:32]}
        trainer = Trainer(None, options, eval_dataset=data[32:], model_init=lambda: GPT2LMHeadModel(config), **rows)
        trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


for dropout in (0.0, 0.1):
    plain, again = trained(dropout), trained(dropout)
    evaluated = trained(dropout, eval_strategy="steps", eval_steps=1)
    repeated, changed = (plain - again).abs().max(), (plain - evaluated).abs().max()
    print(
        f"dropout {dropout}: largest difference of a weight, a run and its repetition {repeated:.3g}, "
        f"with evaluations and without {changed:.3g}"
    )
before = torch.get_rng_state()
iter(torch.utils.data.DataLoader(data))
print(f"iter(DataLoader) draws from the global generator: {not torch.equal(before, torch.get_rng_state())}")
