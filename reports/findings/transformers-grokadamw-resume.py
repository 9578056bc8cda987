"""transformers: with optim="grokadamw" a resumed Trainer silently starts from empty moments.

The cause is in grokadamw 0.1.2 (see grokadamw-state.py); the Trainer saves and loads what the optimizer gives it.
Trains 4 updates on one repeated batch, then updates 3 and 4 again from the checkpoint of update 2. AdamW: the control.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed
from transformers.utils import logging


def after_step(optimizer, *_) -> None:
    parameter = optimizer.param_groups[0]["params"][0]
    state = (optimizer.state or optimizer.param_groups[0]["state"])[parameter]
    norm = state["exp_avg"].norm().item()
    lines.append(f"step {int(state['step'])}, norm of exp_avg {norm:.4f}, sum of |weight| {parameter.abs().sum():.4f}")


lines: list[str] = []
register_optimizer_step_post_hook(after_step)
logging.disable_progress_bar()
warnings.simplefilter("ignore")  # grokadamw uses torch.cuda.amp
config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=128, bos_token_id=0, eos_token_id=0)
config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
rows = [{"input_ids": torch.arange(17), "labels": torch.arange(17)}] * 8
run = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
for name in ("adamw_torch", "grokadamw"):
    with tempfile.TemporaryDirectory() as folder:
        for resume in (None, str(Path(folder, "checkpoint-2"))):
            set_seed(1)
            model = AutoModelForCausalLM.from_config(config)
            options = TrainingArguments(folder, optim=name, lr_scheduler_type="constant", disable_tqdm=True, **run)
            with contextlib.redirect_stdout(io.StringIO()):
                Trainer(model, options, train_dataset=rows).train(resume_from_checkpoint=resume)
            print(f"{name}, {'resumed after update 2' if resume else 'uninterrupted'}", *lines[-2:], sep="\n  ")
