"""LitGPT: two tensors of DeepSeek-shaped models are missed by pretrain.initialize_weights.

GroupedTopkRouter.weight is torch.empty and has no reset_parameters: it stays uninitialised memory, made visible here
by letting torch fill such memory with NaN. MultiheadLatentAttention.proj is not scaled by depth, like GptNeoxMLP.proj
(litgpt-mlp-init.py). None of LitGPT's named configurations has either; a user's own Config can.
"""

import math

import lightning as L
import torch
from litgpt import pretrain
from litgpt.config import Config

torch.manual_seed(1)
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
router = {
    "n_expert": 8,
    "n_expert_per_token": 2,
    "n_expert_groups": 2,
    "n_topk_groups": 1,
    "n_topk_scores_per_group": 2,
}
mlp = {"mlp_class_name": "LLaMAMoE", "intermediate_size": 256, "moe_intermediate_size": 128, "bias": False}
size = {"n_layer": 6, "n_head": 4, "n_embd": 128, "block_size": 16, "padded_vocab_size": 256}
config = Config(**size, **mlp, **router, latent_attention=ranks)

fabric = L.Fabric(accelerator="cpu", devices=1)
with fabric.init_module(empty_init=True):
    model = pretrain.GPT(config)
pretrain.initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
for name, parameter in model.named_parameters():
    if parameter.isnan().any():
        print(f"not initialised: {name} {tuple(parameter.shape)}")
print(f"logits are NaN: {model(torch.zeros(1, 8, dtype=torch.long)).isnan().any()}")
proj = torch.cat([block.attn.proj.weight.flatten() for block in model.transformer.h]).std().item()
print(f"scaled by depth {1 / math.sqrt(config.n_embd) / config.n_layer:.4f}, latent attention's proj {proj:.4f}")
