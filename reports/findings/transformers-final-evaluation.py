"""transformers: no evaluation follows the last update, in releases that evaluate at multiples of eval_steps only.

Trains three updates with an evaluation every two, and prints after which updates the Trainer evaluates.
"""

import tempfile

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}

print(f"transformers {transformers.__version__}")
with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder, use_cpu=True, max_steps=3, eval_strategy="steps", eval_steps=2, disable_tqdm=True, report_to="none"
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(128, (32, 16))]
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=128))
    trainer = Trainer(model, options, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(f"updates: {trainer.state.global_step}, evaluated after update {', '.join(map(str, evaluated))}")
