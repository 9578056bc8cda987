"""transformers, 5.0 to 5.14: GPT-2's output layers are not scaled by depth (huggingface/transformers#47458).

_init_weights is called for each module, and scales c_proj.weight where it is in charge of a whole model. There, the
name of that tensor has a prefix, so the comparison with "c_proj.weight" never holds. Mended in 5.15.0.
"""

import math

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config

torch.manual_seed(1)
transformers.utils.logging.set_verbosity_error()
for layers in (2, 12, 48):
    config = GPT2Config(n_layer=layers, n_head=2, n_embd=128, vocab_size=128, bos_token_id=0, eos_token_id=0)
    block = AutoModelForCausalLM.from_config(config).transformer.h
    found = [torch.stack([getattr(h, part).c_proj.weight for h in block]).std().item() for part in ("attn", "mlp")]
    scaled = config.initializer_range / math.sqrt(2 * layers)
    print(f"transformers {transformers.__version__}, {layers:2} layers: scaled by depth {scaled:.4f}, "
          f"attn.c_proj {found[0]:.4f}, mlp.c_proj {found[1]:.4f}")  # fmt: skip
