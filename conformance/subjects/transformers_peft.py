"""Adapter of transformers.Trainer on a quantised model with adapters by peft, as their documentation has it.

A recipe without ``finetune`` is trained as by the subject ``transformers``: it makes the weights to start from.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conformance import Checkpoint, Recipe
from conformance.subjects.transformers import TUNING, Transformers

LAYERS = {  # the linear layers of the blocks
    "gpt": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def quantisation(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return what bitsandbytes shall do to the frozen layers."""
    kind = recipe.quantised
    if kind is None:
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    four: dict[str, Any] = {"bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind.endswith("-dq")}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **four)


class TransformersPeft(Transformers):
    """transformers.Trainer.train on peft.get_peft_model."""

    name = "transformers Trainer with peft"
    version = f"{importlib.metadata.version('transformers')}, peft {importlib.metadata.version('peft')}"
    lacks = {name: reason for name, reason in Transformers.lacks.items() if name not in TUNING}
    recipes: dict[Path, Recipe] = {}

    def model(self, recipe: Recipe, config: Any, dtype: torch.dtype) -> Any:
        if recipe.finetune is None:
            return super().model(recipe, config, dtype)
        self.recipes[recipe.directory] = recipe
        folder = recipe.finetune.find("config.json").parent
        options: dict[str, Any] = {"dtype": dtype, "quantization_config": quantisation(recipe, dtype)}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        if recipe.quantised is not None:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        options = {"target_modules": LAYERS[recipe.shape], "fan_in_fan_out": recipe.shape == "gpt"}
        options |= {"modules_to_save": ["wte", "embed_tokens"]} if recipe.tuned_embedding else {}
        if recipe.tied and recipe.tuned_embedding and hasattr(LoraConfig, "ensure_weight_tying"):
            options["ensure_weight_tying"] = True  # without it, peft trains a copy for the embedding alone
        lora = LoraConfig(r=recipe.lora_rank, lora_dropout=recipe.lora_dropout, task_type="CAUSAL_LM", **options)
        return get_peft_model(model, lora)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        names = [path.name for path in checkpoint.files]
        if "adapter_config.json" not in names:
            return super().load(checkpoint)
        folder = checkpoint.find("adapter_config.json").parent
        base = LoraConfig.from_pretrained(folder).base_model_name_or_path
        recipe = self.recipes[folder.parent]  # how the base was quantised, which the adapter does not say
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantisation(recipe, torch.float32))
        return PeftModel.from_pretrained(model, folder).eval()
