"""Adapter of x-transformers (pip install x-transformers): its TransformerWrapper, trained by the reference trainer.

x-transformers has modules and no training loop, so a pair is judged: its initialisation, numerics and names on one
side, and on the other a trainer that must cope with a module of somebody else's. The models hold what rules about
parameter groups stumble over: memory tokens, memory keys/values, gains that are stored as their offset from 1.
"""

import importlib.metadata
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from x_transformers import Decoder, TransformerWrapper

from conformance import Checkpoint, Constant, Normal, Recipe, TensorInfo, Uniform
from conformance.subject import Distribution
from conformance.subjects.reference import Reference, ReferencePolicy
from reference.checkpoint import load_model, load_state
from reference.model.embedding import restore_embeddings, swap_embeddings

# The matrices that multiply activations. ff.0.0 is the first one of a GELU MLP, ff.0.proj of a SwiGLU MLP.
MATRICES = ("to_q", "to_k", "to_v", "to_out", "ff.0.0", "ff.0.proj", "ff.2", "to_logits")
OF_GPT = "activation-checkpointing finetune quantised lora-dropout tuned-embedding initial-std residual-opt-out"
OF_GPT += " rotary-base norm-eps"


class XTransformersPolicy(ReferencePolicy):
    """Initial weights as in x_transformers.py, which leaves most to torch; decay by role and learning rate: ours."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Distribution:
        if tensor.name == "token_emb.emb.weight":  # TokenEmbedding.init_: kaiming_normal_
            return Normal(0.0, (2 / recipe.n_embd) ** 0.5)
        if tensor.name.endswith(("memory_tokens", "mem_k", "mem_v", "pos_emb.emb.weight")):  # torch.randn
            return Normal(0.0, 1.0)
        if tensor.name.endswith((".g", ".gamma")):  # those in AttentionLayers are offsets: norm_add_unit_offset
            return Constant(0.0 if tensor.name.startswith("attn_layers.") else 1.0)
        inputs = 4 * recipe.n_embd if ".ff.2." in tensor.name else recipe.n_embd  # nn.Linear, its bias included
        return Uniform(-(inputs**-0.5), inputs**-0.5)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        if recipe.decay != "declared" or recipe.module is not None:
            return super().decays(recipe, tensor)
        return tensor.name.endswith(tuple(f"{part}.weight" for part in MATRICES))


def build(recipe: Recipe) -> nn.Module:
    """gpt: learned positions, a LayerNorm behind the embedding, ScaleNorms inside. llama: without biases, but one."""
    llama = {"use_rmsnorm": True, "rotary_pos_emb": True, "ff_swish": True, "ff_glu": True, "ff_no_bias": True}
    size: dict[str, Any] = {"dim": recipe.n_embd, "depth": recipe.n_layer, "heads": recipe.n_head, "verbose": False}
    size |= {"attn_dim_head": recipe.n_embd // recipe.n_head, "attn_num_mem_kv": 2, "attn_kv_heads": recipe.n_kv_head}
    size |= {"attn_dropout": recipe.dropout, "ff_dropout": recipe.dropout}
    layers = Decoder(**size, **({"use_scalenorm": True} if recipe.shape == "gpt" else llama))
    sizes = {"num_tokens": recipe.vocab_size, "max_seq_len": recipe.block_size, "num_memory_tokens": 2}
    options = {"post_emb_norm": recipe.shape == "gpt", "tie_embedding": recipe.tied}
    return TransformerWrapper(attn_layers=layers, **sizes, **options)


class XTransformers(Reference):
    """reference.Trainer on x_transformers.TransformerWrapper."""

    name, policy = "x-transformers", XTransformersPolicy()
    version = importlib.metadata.version("x-transformers")
    lacks = Reference.lacks | {"meta-init": "TransformerWrapper, Attention and the norms have no reset_parameters()"}
    lacks |= dict.fromkeys((*OF_GPT.split(), "lora-everywhere"), "Trainer has this option for its own GPT only")
    recipes: dict[Path, Recipe] = {}  # by directory: a checkpoint cannot say how to build a module of somebody else's

    def model_config(self, recipe: Recipe) -> Any:  # a function, which Trainer takes as well as a GPTConfig
        self.recipes[recipe.directory] = recipe
        return partial(build, recipe)

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        folder = checkpoint.find("model.safetensors").parent
        model = build(self.recipes[folder.parent])
        model.to(torch.bfloat16 if self.recipes[folder.parent].precision == "bf16-true" else torch.float32)
        if load_state(folder)["stable_embedding"]:
            swap_embeddings(model)
        load_model(folder, model)
        return restore_embeddings(model)
