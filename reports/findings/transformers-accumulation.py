"""transformers: with releases that divide the loss twice, accumulated gradients are too small by the number of steps.

The Trainer divides the losses of an update by its number of targets. accelerate's backward divides again by the steps
that its GradientAccumulationPlugin was given. Prints the norm of the first update's gradient: the same 8 sequences in
one batch, and in 2 and 4 microbatches. SGD moves by the gradient, so the movement shows its length.
"""

import contextlib
import io
import tempfile

import accelerate
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}")
config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=64, vocab_size=128)
torch.manual_seed(1)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(128, (8, 16))]
for steps in (1, 2, 4):
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    before = [weight.detach().clone() for weight in model.parameters()]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = TrainingArguments(
            folder, use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=0,
            per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
            optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, options, train_dataset=rows).train()
    moved = torch.stack([(new - old).norm() for new, old in zip(model.parameters(), before)]).norm()
    print(f"{steps} microbatches of {8 // steps}: the gradient has the norm {moved:.4f}")
