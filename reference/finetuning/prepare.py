"""From a module with trained weights to one that is fine-tuned: freeze, swap, quantise, adapt, in this order.

All of it comes before the optimizer is built, which must own what is trained and nothing else. LitGPT's LoRA script
swaps the embedding afterwards, and then trains neither its table nor its norm.
"""

import logging

import torch
from torch import nn

from reference.errors import ConfigurationError
from reference.finetuning.adapters import add_adapters
from reference.finetuning.closest import fit_norm
from reference.finetuning.config import FinetuneConfig
from reference.finetuning.quantised import quantise
from reference.model.embedding import is_stable, swap_embeddings
from reference.model.gpt import GPT

logger = logging.getLogger("reference")


def prepare(
    module: nn.Module, config: FinetuneConfig, *, stable: bool, trained: bool, dtype: torch.dtype, seed: int
) -> list[str]:
    """Make a module ready for fine-tuning, in place.

    Args:
        module: with its weights, on the device that computes.
        config: what to freeze, quantise and add.
        stable: train with StableEmbedding.
        trained: the weights come from training, so a new norm is set to change them least.
        dtype: that the linear layers compute in.
        seed: decides the adapters.

    Returns:
        What changes the function of the model, each in words with its size; empty if nothing does.

    Raises:
        ConfigurationError: if a package is missing, or the module is not a reference.GPT.
    """
    if config.lora_rank is not None and not isinstance(module, GPT):
        raise ConfigurationError(
            f"LoRA works on reference.GPT, not on {type(module).__name__}: set lora_rank to None, or use peft on the "
            "module before you hand it over."
        )
    if config.lora_rank is not None:
        module.requires_grad_(False)
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.requires_grad_(config.embeddings or stable)
    changes = []
    if stable:
        swap_embeddings(module)
        if trained:
            changes += [
                f"StableEmbedding (norm set so that the rows of {name} change least: by {fit_norm(part):.1%})"
                for name, part in module.named_modules()
                if isinstance(part, nn.Embedding) and is_stable(part)
            ]
    if config.lora_rank is None:
        return changes
    names = linear_layers(module)
    if config.quantize != "none":
        error = quantise(module, names, config.quantize, dtype)
        changes.append(f"{config.quantize} weights (they change by {error:.1%})")
    add_adapters(module, names, config, seed)
    count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    logger.info(
        "fine-tuning: LoRA of rank %d on %d linear layers, whose own weights are frozen%s; %s; %d weights are trained",
        *(config.lora_rank, len(names), "" if config.quantize == "none" else f" and kept as {config.quantize}"),
        *("the embedding is trained too" if config.embeddings or stable else "the embedding is frozen", count),
    )
    return changes


def linear_layers(module: nn.Module) -> list[str]:
    """Return the names of the linear layers in the blocks of a GPT: all but the head, as QLoRA has it."""
    return [name for name, part in module.named_modules() if type(part) is nn.Linear and name.startswith("blocks.")]
