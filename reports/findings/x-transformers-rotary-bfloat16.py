"""x-transformers: with bfloat16 weights, rotary positions are counted in bfloat16.

RotaryEmbedding keeps inv_freq as a buffer, casts the positions to its dtype and multiplies. Under autocast that is
float32, as a decorator sees to it. In a model that was moved to bfloat16 it is not, and there 257 is 256.
"""

import torch
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

LENGTH = 2048


def build() -> nn.Module:
    options = {"dim": 64, "depth": 1, "heads": 1, "attn_dim_head": 64, "rotary_pos_emb": True, "rotary_emb_dim": 64}
    return TransformerWrapper(num_tokens=256, max_seq_len=LENGTH, attn_layers=Decoder(**options))


def phases(model: nn.Module) -> Tensor:
    """What the attention is given in a forward: (LENGTH, 64)."""
    seen: list[Tensor] = []
    model.attn_layers.rotary_pos_emb.register_forward_hook(lambda *call: seen.append(call[-1][0][0]))
    model(torch.zeros(1, LENGTH, dtype=torch.long))
    return seen[0]


exact = phases(build())
coarse = build().bfloat16()
restored = build()
restored.load_state_dict(coarse.state_dict())
with torch.autocast("cpu", torch.bfloat16):
    mixed = phases(build())
found = {"float32": exact, "bfloat16 autocast": mixed, "bfloat16 weights": phases(coarse)}
found["float32, loaded from those weights"] = phases(restored)
print(f"{'model':34}  distinct positions of {LENGTH}   largest error of cos among the first 64, 256, {LENGTH}")
for name, seen in found.items():
    errors = [(seen[:n].float().cos() - exact[:n].cos()).abs().max().item() for n in (64, 256, LENGTH)]
    print(f"{name:34}  {len(seen.unique(dim=0)):4} in {seen.dtype!s:15}       {[round(error, 2) for error in errors]}")
