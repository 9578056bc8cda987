"""LoRA by peft, on any module: its adapters beside linear layers, plain or quantised."""

import math

import torch
from torch import nn

from reference.errors import ConfigurationError, first_line
from reference.finetuning.config import FinetuneConfig
from reference.finetuning.quantised import is_quantised
from reference.model.initialization import derive_seed

ADAPTER = "default"  # peft's own name for the only adapter


def add_adapters(module: nn.Module, names: list[str], config: FinetuneConfig, seed: int) -> None:
    """Put LoRA adapters beside linear layers, in place. They add nothing until they are trained.

    Each first matrix is drawn as peft draws it, but from the seed and the layer's name alone: the same on every rank,
    device and precision. Everything else of the module keeps its ``requires_grad``.

    Raises:
        ConfigurationError: if peft is not installed, or refuses.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigurationError(
            f"lora_rank={config.lora_rank} needs peft ({first_line(error)}): pip install 'gpt-conformance[finetune]'."
        ) from error
    assert config.lora_rank is not None
    kinds = {type(module.get_submodule(name)).__name__ for name in names if is_quantised(module.get_submodule(name))}
    # peft asks these two for which of its layers to take, as transformers sets them.
    flags = {"is_loaded_in_4bit": "Linear4bit" in kinds, "is_loaded_in_8bit": "Linear8bitLt" in kinds}
    kept = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        bias="none",
    )
    for name, value in flags.items():
        setattr(module, name, value)
    try:
        inject_adapter_in_model(lora, module, ADAPTER)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"peft refuses LoRA of rank {config.lora_rank}: {first_line(error)}.") from error
    finally:
        for name in flags:
            delattr(module, name)
    stored = next(p.dtype for n, p in module.named_parameters() if ".lora_" not in n and p.is_floating_point())
    for name, parameter in module.named_parameters():
        if ".lora_" in name:  # peft takes the dtype that a quantised layer computes in
            parameter.data = parameter.data.to(stored)
        else:  # and it freezes all but its own
            parameter.requires_grad_(kept[name.replace(".base_layer.", ".")])
    draw(module, seed)


@torch.no_grad()
def draw(module: nn.Module, seed: int) -> None:
    """Draw the first matrix of each adapter, (rank, inputs), uniformly in 1 / sqrt(inputs), as nn.Linear does."""
    for name, parameter in module.named_parameters():
        if f".lora_A.{ADAPTER}." in name:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            bound = 1.0 / math.sqrt(parameter.size(1))
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(drawn)
