"""LitGPT: the output layer of GptNeoxMLP starts without the scaling by depth.

pretrain.initialize_weights gives mod.proj the deviation 1 / sqrt(n_embd) / n_layer, but only where mod is a LLaMAMLP
or a CausalSelfAttention. GptNeoxMLP.proj (Pythia, Falcon, phi-2, ...) keeps sqrt(2 / 5 / n_embd), which does not
depend on the depth. Builds and initialises models of both families as pretrain.main does, and measures.
"""

import math

import lightning as L
import torch
from litgpt import pretrain
from litgpt.config import Config, name_to_config

fabric = L.Fabric(accelerator="cpu", devices=1)


def show(name: str, **changes: object) -> None:
    config = Config.from_name(name, n_embd=128, n_head=4, n_query_groups=4, padded_vocab_size=256, **changes)
    torch.manual_seed(1)
    with fabric.init_module(empty_init=True):
        model = pretrain.GPT(config)
    pretrain.initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    design = 1 / math.sqrt(config.n_embd) / config.n_layer
    attention, mlp = (
        torch.cat([part(block).proj.weight.flatten() for block in model.transformer.h]).std().item()
        for part in (lambda block: block.attn, lambda block: block.mlp)
    )
    print(
        f"{name:16} {config.mlp_class_name:10} layers {config.n_layer:2}  scaled by depth {design:.4f}"
        f"  attn.proj {attention:.4f}  mlp.proj {mlp:.4f}  ({mlp / design:.1f} times)"
    )


for n_layer in (6, 12, 24):
    show("pythia-160m", n_layer=n_layer, intermediate_size=512)
show("tiny-llama-1.1b", n_layer=12, intermediate_size=512)
affected = [name for name in name_to_config if Config.from_name(name).mlp_class_name == "GptNeoxMLP"]
print(f"{len(affected)} of {len(name_to_config)} named configurations use GptNeoxMLP")
