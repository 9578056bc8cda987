"""transformers: fp16=True on the CPU trains in float32, without a word.

Trains two updates under each setting and looks at the dtype in which the last layer computes, and at what is logged.
"""

import contextlib
import io
import logging
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
data = [{"input_ids": row, "labels": row} for row in torch.randint(128, (8, 17))]
seen: list[torch.dtype] = []
transformers.utils.logging.enable_propagation()
logging.captureWarnings(True)
for setting in ({}, {"bf16": True}, {"fp16": True}):
    model, said = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes)), io.StringIO()
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    logging.basicConfig(stream=said, force=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        options = TrainingArguments(folder, use_cpu=True, max_steps=2, save_strategy="no", **setting)
        trainer = Trainer(model, options, train_dataset=data)
        trainer.train()
    found = [line for line in said.getvalue().splitlines() if "fp16" in line or "float" in line]
    precision = trainer.accelerator.mixed_precision
    print(
        f"{setting!s:14} accelerator: {precision:4}  computed in {seen[-1]!s:14}  lines with 'fp16' or 'float': {found}"
    )
