"""x-transformers: a copy of a model with tie_embedding=True keeps the original's table as its head.

to_logits is a lambda, made in the constructor, that closes over the original ``self``; copy.deepcopy does not look
inside a function. The frozen reference model of x_transformers.dpo.DPO is such a copy. Trains a model for five steps,
and asks a frozen copy of it before and after.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from x_transformers import Decoder, TransformerWrapper
from x_transformers.dpo import DPO


def drift(tied: bool, copy_of: Callable[[nn.Module], nn.Module]) -> float:
    """How far the logits of the copy move while the model is trained."""
    torch.manual_seed(1)
    layers = Decoder(dim=32, depth=1, heads=2)
    model = TransformerWrapper(num_tokens=64, max_seq_len=16, tie_embedding=tied, attn_layers=layers)
    frozen = copy_of(model).eval()
    ids = torch.randint(0, 64, (2, 16))
    before = frozen(ids).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    return (frozen(ids) - before).abs().max().item()


ways = {"DPO(model).ref_model": lambda model: DPO(model).ref_model, "copy.deepcopy(model)": copy.deepcopy}
ways["AveragedModel(model), never updated"] = AveragedModel
for way, copy_of in ways.items():
    print(f"{way:35}  logits move by {drift(False, copy_of):.4f} untied, {drift(True, copy_of):.4f} tied")
