"""transformers: a bfloat16 checkpoint is loaded, and trained, in bfloat16 without a word; small updates are lost.

Since release 5 from_pretrained keeps the dtype of the checkpoint, and the Trainer trains the model that it is given. A
bfloat16 weight has 8 significant bits; an update below half a unit in the last place leaves it as it was. Saves a model
in bfloat16, trains it for 20 updates as loaded and as loaded with dtype=torch.float32, and compares how far the weights
moved (norms: the LayerNorm weights, which start at 1). All that is logged, printed or warned is searched.
"""

import contextlib
import io
import logging
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, set_seed


def movement(lr: float, **keywords: torch.dtype) -> tuple[float, float, torch.dtype]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/bf16", **keywords)
    dtype, before = model.dtype, {name: p.detach().double() for name, p in model.named_parameters()}
    options = TrainingArguments(folder, learning_rate=lr, lr_scheduler_type="constant", **run)
    Trainer(model, options, train_dataset=data).train()
    moved = {name: (p.detach().double() - before[name]).abs().sum().item() for name, p in model.named_parameters()}
    return sum(moved.values()), sum(moved[name] for name in moved if ".ln_" in name and "weight" in name), dtype


torch.set_num_threads(1)
set_seed(1)
run = {"use_cpu": True, "max_steps": 20, "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 2}
data = [{"input_ids": row, "labels": row} for row in torch.randint(128, (40, 17))]
config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=128, bos_token_id=0, eos_token_id=0)
said, lines = io.StringIO(), []
transformers.utils.logging.enable_propagation()
logging.captureWarnings(True)
logging.basicConfig(stream=said)
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(f"{folder}/bf16")
    for lr in (1e-3, 1e-4, 5e-5, 1e-5):
        exact, coarse = movement(lr, dtype=torch.float32), movement(lr)
        ratio, norms = coarse[0] / exact[0], coarse[1] / exact[1]
        lines.append(f"lr {lr:.0e}: {coarse[2]} / {exact[2]}, all weights {ratio:.1%}, norms {norms:.1%}")
found = [line for line in said.getvalue().splitlines() if "bf16" in line or "float" in line]
print(*lines, f"of {len(said.getvalue().splitlines())} lines said, with 'bf16' or 'float': {found}", sep="\n")
