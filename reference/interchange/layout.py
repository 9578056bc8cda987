"""How transformers writes a GPT down: names of settings and tensors of GPT2LMHeadModel and LlamaForCausalLM."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from reference.config import GPTConfig
from reference.errors import ConfigurationError
from reference.model.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a class of transformers writes down what a GPT of ours holds."""

    architecture: str
    """Name of the class."""
    model_type: str
    """Name of its configuration."""
    shape: Mapping[str, Any]
    """Fields of GPTConfig that the class leaves no choice in."""
    fields: Mapping[str, tuple[str, Any]]
    """Our field -> its name in their config.json, and the value there if it is left out (``...``: it must be there)."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Their field -> the values that we can express; the first is the one if it is left out."""
    prefix: str
    """What stands before the names of all tensors but the head's."""
    blocks: str
    """Their name for our ``blocks``."""
    names: Mapping[str, tuple[str, ...]]
    """Our module -> theirs. Of several, the weights stacked on each other are ours."""
    transposed: bool
    """Linear layers are Conv1D: their weights are (in, out), not (out, in)."""
    ignored: str
    """A pattern of tensors that early releases wrote and that are not weights."""


GPT2 = Layout(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    shape={"norm": "layernorm", "position": "learned", "mlp": "gelu"},
    fields={
        "vocab_size": ("vocab_size", ...),
        "block_size": ("n_positions", ...),
        "n_layer": ("n_layer", ...),
        "n_head": ("n_head", ...),
        "n_embd": ("n_embd", ...),
        "intermediate_size": ("n_inner", None),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "dropout": ("resid_pdrop", 0.1),
        "init_std": ("initializer_range", 0.02),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    prefix="transformer.",
    blocks="h",
    names={
        "embedding": ("wte",),
        "position": ("wpe",),
        "norm_attention": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),  # query, key and value heads in the same order as ours
        "attention.proj": ("attn.c_proj",),
        "norm_mlp": ("ln_2",),
        "mlp.fc": ("mlp.c_fc",),
        "mlp.proj": ("mlp.c_proj",),
        "norm": ("ln_f",),
    },
    transposed=True,
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",
)
LLAMA = Layout(
    architecture="LlamaForCausalLM",
    model_type="llama",
    shape={"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu"},
    fields={
        "vocab_size": ("vocab_size", ...),
        "block_size": ("max_position_embeddings", ...),
        "n_layer": ("num_hidden_layers", ...),
        "n_head": ("num_attention_heads", ...),
        "n_kv_head": ("num_key_value_heads", None),
        "n_embd": ("hidden_size", ...),
        "intermediate_size": ("intermediate_size", ...),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "rope_theta": ("rope_theta", 10000.0),
        "bias": ("attention_bias", False),
        "init_std": ("initializer_range", 0.02),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "sliding_window": (None,),
        "quantization_config": (None,),
    },
    prefix="model.",
    blocks="layers",
    names={
        "embedding": ("embed_tokens",),
        "norm_attention": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.proj": ("self_attn.o_proj",),
        "norm_mlp": ("post_attention_layernorm",),
        "mlp.gate": ("mlp.gate_proj",),
        "mlp.fc": ("mlp.up_proj",),
        "mlp.proj": ("mlp.down_proj",),
        "norm": ("norm",),
    },
    transposed=False,
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)
LAYOUTS = {layout.model_type: layout for layout in (GPT2, LLAMA)}


def choose_layout(config: GPTConfig) -> Layout:
    """Return the class of transformers that computes what this configuration does.

    Raises:
        ConfigurationError: if there is none; it names the field.
    """
    layout = GPT2 if config.position == "learned" else LLAMA
    for name, value in layout.shape.items():
        if getattr(config, name) != value:
            raise ConfigurationError(
                f"{name} is {getattr(config, name)!r}, but {layout.architecture}, the class with {config.position} "
                f"positions, has {value!r}: transformers has no class for this model."
            )
    if layout is GPT2 and config.kv_heads != config.n_head:
        raise ConfigurationError(
            f"n_kv_head is {config.kv_heads} and n_head {config.n_head}, but GPT2LMHeadModel, the class with learned "
            "positions, has as many key/value heads as query heads: transformers has no class for this model."
        )
    return layout


def their_names(layout: Layout, name: str) -> tuple[str, ...]:
    """Return their names, without the prefix, of our tensor: its rows are theirs, one below the other."""
    module, _, kind = name.rpartition(".")
    if module == "head":
        return (f"lm_head.{kind}",)
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return tuple(f"{layout.blocks}.{found[1]}.{part}.{kind}" for part in layout.names[found[2]])
    return (f"{layout.names[module][0]}.{kind}",)


def their_shapes(layout: Layout, config: GPTConfig, name: str, shape: torch.Size) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that :func:`their_names` names."""
    if is_transposed(layout, name):
        return [tuple(shape)[::-1]]
    if len(their_names(layout, name)) == 1:
        return [tuple(shape)]
    return [(heads * config.head_size, *shape[1:]) for heads in (config.n_head, config.kv_heads, config.kv_heads)]


def is_transposed(layout: Layout, name: str) -> bool:
    """Return whether their tensor is the transpose of ours: the weight of a linear layer in a block of GPT-2."""
    return layout.transposed and name.endswith(".weight") and "norm" not in name and name.startswith("blocks.")


def our_shapes(config: GPTConfig) -> Iterator[tuple[str, torch.Size]]:
    """Yield name and shape of each tensor of a GPT, a tied one once, without building it.

    Raises:
        ConfigurationError: if a tensor would be larger than any memory.
    """
    try:
        with torch.device("meta"):
            one = GPT(replace(config, n_layer=1)).state_dict()
    except (RuntimeError, TypeError) as error:  # sizes that overflow 64 bits, alone or as a product
        raise ConfigurationError(f"no model can be as large as {config}.") from error
    for name, tensor in one.items():
        if name.startswith("blocks.0."):
            continue
        if name != "head.weight" or not config.tie_embeddings:
            yield name, tensor.shape
    for block in range(config.n_layer):
        for name, tensor in one.items():
            if name.startswith("blocks.0."):
                yield name.replace("blocks.0.", f"blocks.{block}.", 1), tensor.shape
