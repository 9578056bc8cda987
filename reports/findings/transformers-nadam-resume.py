"""transformers: with bfloat16 weights, a resume rounds the state of NAdam that is not of a weight's shape.

PyTorch's load_state_dict casts `mu_product`, a float32 number, to the dtype of its parameter. Trains 4 updates on one
repeated batch, then updates 3 and 4 again from the checkpoint of update 2. AdamW: the control.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed
from transformers.utils import logging


def after_step(optimizer, *_) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    product = optimizer.state[parameters[0]].get("mu_product")
    told = "" if product is None else f", mu_product {product.item():.8f} in {product.dtype}"
    lines.append(f"sum of |weights| {sum(p.detach().double().abs().sum() for p in parameters):.6f}{told}")


lines: list[str] = []
register_optimizer_step_post_hook(after_step)
logging.disable_progress_bar()
config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=128, bos_token_id=0, eos_token_id=0)
config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
rows = [{"input_ids": torch.arange(17), "labels": torch.arange(17)}] * 8
run = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}
for kind in (torch.optim.AdamW, torch.optim.NAdam):
    with tempfile.TemporaryDirectory() as folder:
        for resume in (None, str(Path(folder, "checkpoint-2"))):
            set_seed(1)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            options = TrainingArguments(folder, lr_scheduler_type="constant", **run)
            with contextlib.redirect_stdout(io.StringIO()):
                trainer = Trainer(model, options, train_dataset=rows, optimizer_cls_and_kwargs=(kind, {"lr": 1e-2}))
                trainer.train(resume_from_checkpoint=resume)
            print(f"{kind.__name__}, {'resumed after update 2' if resume else 'uninterrupted'}: {lines[-1]}")
