"""transformers, peft and bitsandbytes on the CPU: fine-tuning a 4-bit GPT-2 stops after the first evaluation.

The Trainer evaluates after every second update. On a CPU with AVX512-BF16, bitsandbytes packs the 4-bit weights anew in
evaluation, and its training forward then fails (bitsandbytes-cpu-evaluation.py shows why). A Llama, whose layers have
no biases, goes on, and its first layers get no gradient any more.
"""

import tempfile
import warnings
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

warnings.filterwarnings("ignore")
torch.manual_seed(1)
print(f"AVX512-BF16: {bool(has_avx512bf16())}")
SIZE: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = GPT2Config(**SIZE, n_positions=32, n_embd=64, n_layer=2, n_head=2)
LLAMA = LlamaConfig(**SIZE, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
rows = torch.randint(128, (16, 17), generator=torch.Generator().manual_seed(0))
data: Any = [{"input_ids": row, "labels": row} for row in rows]


class Look(TrainerCallback):
    """Prints the gradient of the adapters in the first block."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [p.grad for n, p in kwargs["model"].named_parameters() if ".0." in n and "lora_B" in n]
        norms = [0.0 if gradient is None else float(gradient.norm()) for gradient in found]
        print(f"  update {state.global_step + 1}: gradient of the first block's adapters {max(norms, default=0.0):.4f}")


for name, built, layers in (("GPT-2", GPT2LMHeadModel(GPT2), "c_attn"), ("Llama", LlamaForCausalLM(LLAMA), "q_proj")):
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=[layers], task_type="CAUSAL_LM"))
        options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "disable_tqdm": True}
        args = TrainingArguments(folder, use_cpu=True, report_to="none", save_strategy="no", **options)
        print(name)
        try:
            Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[Look()]).train()
            print("  trained to the end")
        except RuntimeError as error:
            print(f"  RuntimeError: {error}")
