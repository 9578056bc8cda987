"""transformers: one NaN in one gradient, and all weights are NaN; the Trainer goes on and logs a loss of zero.

Puts a NaN into one element of one gradient, in the backward of update 3 of 6, as an overflow would. Clipping is on, at
its default of 1.0. Prints what the Trainer logs, and whether the weights and the checkpoint are finite.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging


class Count(TrainerCallback):
    def on_step_end(self, args, state, control, **keywords):
        finite = all(tensor.isfinite().all() for tensor in keywords["model"].parameters())
        lines.append(f"after update {state.global_step}: weights finite: {bool(finite)}")

    def on_log(self, args, state, control, logs=None, **keywords):
        if "loss" in logs:
            lines.append(f"  logged: loss {logs['loss']}, grad_norm {logs['grad_norm']}")


def poison(parameter):
    if trainer.state.global_step == 2:
        parameter.grad[0] = torch.nan


lines = []
logging.set_verbosity_error()
torch.manual_seed(1)
data = [{"input_ids": row, "labels": row} for row in torch.randint(128, (48, 16))]
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=128, bos_token_id=0, eos_token_id=0))
model.transformer.ln_f.weight.register_post_accumulate_grad_hook(poison)
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
    options = TrainingArguments(folder, use_cpu=True, max_steps=6, save_steps=6, logging_steps=1, disable_tqdm=True)
    trainer = Trainer(model, options, train_dataset=data, callbacks=[Count()])
    with contextlib.redirect_stderr(said):
        trainer.train()
    saved = load_file(Path(folder, "checkpoint-6", "model.safetensors"))
print(*lines, sep="\n")
print(f"checkpoint: {sum(not t.isfinite().all() for t in saved.values())} of {len(saved)} tensors are not finite")
print(f"lines said with 'nan' that are no log of numbers: "
      f"{[x for x in said.getvalue().splitlines() if 'nan' in x.lower() and 'grad_norm' not in x]}")  # fmt: skip
