"""transformers: evaluate() with bf16_full_eval=True leaves the model in bfloat16, with rounded rotary frequencies.

The weights are cast in place and never cast back, and with them the buffer inv_freq of a Llama, from which positions
are computed. Evaluates a float32 model once, as for a baseline, and then trains it for one update.
"""

import contextlib
import io
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments


def cos() -> torch.Tensor:
    """The table that attention is given: (2048, 64)."""
    return model.model.rotary_emb(torch.zeros(1), torch.arange(2048)[None])[0][0]


def show(when: str) -> None:
    errors = [round((cos() - exact)[:length].abs().max().item(), 3) for length in (64, 256, 2048)]
    print(f"{when:16} weights {model.dtype}, inv_freq {model.model.rotary_emb.inv_freq.dtype}, errors of cos {errors}")


transformers.utils.logging.disable_progress_bar()
sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 64, "intermediate_size": 64}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **sizes))
exact = cos()
data = [{"input_ids": row, "labels": row} for row in torch.randint(128, (8, 17))]
print("largest errors of cos among the first 64, 256 and 2048 positions")
show("built")
with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(folder, use_cpu=True, bf16_full_eval=True, max_steps=1, disable_tqdm=True)
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data)
    for step in (trainer.evaluate, trainer.train):
        with contextlib.redirect_stdout(io.StringIO()):
            step()
        show(f"after {step.__name__}()")
    resumed = AutoModelForCausalLM.from_pretrained(f"{folder}/checkpoint-1")
    print(f"{'its checkpoint':16} weights {resumed.dtype}, inv_freq {resumed.model.rotary_emb.inv_freq.dtype}")
