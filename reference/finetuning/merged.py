"""One plain weight per layer again: what was quantised in float32, what LoRA added inside it."""

import re
from collections.abc import Mapping

from torch import Tensor

from reference.errors import ConfigurationError
from reference.finetuning.adapters import ADAPTER
from reference.finetuning.config import FinetuneConfig
from reference.finetuning.quantised import dense_weights

MATRIX = re.compile(rf"(.+)\.lora_([AB])\.{ADAPTER}\.weight")


def merged_weights(state: Mapping[str, Tensor], config: FinetuneConfig) -> dict[str, Tensor]:
    """Return the state dict of the plain model that computes what a fine-tuned one does, but for rounding.

    Args:
        state: of the fine-tuned model; a plain one is returned as it is.
        config: how it was fine-tuned.

    Returns:
        Tensors under the names of reference.GPT. Those of LoRA are float32: 16 bits would lose what is small in it.

    Raises:
        ConfigurationError: if the tensors, which may come from a forged file, do not fit together.
    """
    if config.lora_rank is None:
        return dict(state)
    try:
        plain = dense_weights(state)
        added = adapters(plain)
        for layer, (first, second) in added.items():
            name = f"{layer}.base_layer.weight"
            delta = config.scale * (second.float() @ first.float())
            plain[name] = plain[name].float() + delta.to(plain[name].device)
    except (KeyError, RuntimeError) as error:
        raise ConfigurationError(f"the weights of LoRA do not fit those of the model ({error})") from error
    return {
        name.replace(".base_layer.", "."): tensor.float()
        for name, tensor in plain.items()
        if not MATRIX.fullmatch(name)
    }


def adapters(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two matrices of each adapter, (rank, inputs) and (outputs, rank), by the name of its layer."""
    layers = dict.fromkeys(found[1] for name in state if (found := MATRIX.fullmatch(name)))
    pair = {layer: [state[f"{layer}.lora_{letter}.{ADAPTER}.weight"] for letter in "AB"] for layer in layers}
    return {layer: (first, second) for layer, (first, second) in pair.items()}
