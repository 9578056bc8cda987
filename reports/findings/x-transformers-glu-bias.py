"""x-transformers: ff_no_bias=True leaves a bias in the MLP if ff_glu=True.

FeedForward hands no_bias to its two nn.Linear, but GLU makes a projection of its own and is not told.
"""

from x_transformers import Decoder

for glu in (False, True):
    layers = Decoder(dim=32, depth=1, heads=2, use_rmsnorm=True, ff_no_bias=True, ff_glu=glu, ff_swish=True)
    biases = [f"{name} {tuple(tensor.shape)}" for name, tensor in layers.named_parameters() if name.endswith("bias")]
    print(f"ff_no_bias=True, ff_glu={glu!s:5}  biases: {', '.join(biases) or 'none'}")
