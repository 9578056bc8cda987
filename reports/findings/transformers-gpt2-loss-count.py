"""transformers: the Trainer divides GPT-2's loss by one token too many per sequence.

It divides the sum over an update by a count of labels. A causal model predicts no first token, so that label must not
count. The Trainer leaves it out where the model's loss is ForCausalLMLoss, which it takes from the name of the class.
Compares the loss of the first update, as backward sees it and as it is logged, and eval_loss after it, with the mean
cross entropy of the same logits, and lists the classes concerned.
"""

import contextlib
import io
import re
import tempfile

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
sizes |= {"vocab_size": 128, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0}
logging.set_verbosity_error()
torch.manual_seed(1)
seen: list[dict[str, torch.Tensor]] = []
for kind, length in (("llama", 16), ("gpt2", 16), ("gpt2", 128), ("gpt2", 1024)):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    row = torch.randint(128, (length,))
    model.register_forward_hook(lambda *call: seen.append(call[-1]))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = TrainingArguments(folder, use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
        data = [{"input_ids": row, "labels": row}] * 8
        trainer = Trainer(model, options, train_dataset=data, eval_dataset=data)
        logged = trainer.train().training_loss
        loss, logits = seen[-1]["loss"].item(), seen[-1]["logits"].detach()
        evaluated = trainer.evaluate()["eval_loss"]
    pair = (logits, seen[-1]["logits"])
    right, after = (cross_entropy(x[:, :-1].flatten(0, 1), row[1:].repeat(8)).item() for x in pair)
    print(f"{type(model).__name__:16} loss_type {model.loss_type!s:11}  {length:4} tokens: loss {loss:.4f}, mean cross "
          f"entropy {right:.4f}, ratio {loss / right:.4f}, of the logged one {logged / right:.4f}, of eval_loss "
          f"{evaluated / after:.4f}, (T - 1) / T {(length - 1) / length:.4f}")  # fmt: skip
names = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))
unnamed = [name for name in names if not re.search("|".join(LOSS_MAPPING), name)]
print(f"{len(unnamed)} of {len(names)} causal models have no loss_type: {', '.join(unnamed)}")
