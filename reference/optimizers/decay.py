"""Parameter groups: which tensors weight decay is for."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger("reference")


def decay_groups(
    model: nn.Module,
    decay: str = "role",
    dimensions: Mapping[str, int] | None = None,
    chosen: Collection[int] | None = None,
) -> list[dict[str, Any]]:
    """Return the parameter groups: the tensors that decay, and with ``weight_decay`` 0 those that do not.

    Args:
        model: any module. Each trainable tensor lands in exactly one group; frozen ones in none.
        decay: ``role`` decides by what a tensor is for (:func:`is_decayed`), ``ndim`` decays tensors of two and
            more dimensions (nanoGPT's rule), ``all`` decays everything.
        dimensions: of the tensors by name, where sharding has flattened them. None: as they are.
        chosen: ids of the tensors that one of two optimizers trains. None: all.

    A tied tensor decays only if it would under each of its names: an embedding stays one when the head shares it.
    """
    owners = dict(model.named_modules())
    decayed: dict[int, bool] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            owner = owners[name.rpartition(".")[0]]
            ndim = parameter.ndim if dimensions is None else dimensions[unsharded_name(name)]
            verdict = decay == "all" or (ndim >= 2 if decay == "ndim" else is_decayed(name, ndim, owner))
            tensors[id(parameter)] = parameter
            decayed[id(parameter)] = decayed.get(id(parameter), True) and verdict
    if chosen is not None:
        tensors = {key: tensor for key, tensor in tensors.items() if key in chosen}
    groups: list[dict[str, Any]] = [
        {"params": [tensor for key, tensor in tensors.items() if decayed[key]]},
        {"params": [tensor for key, tensor in tensors.items() if not decayed[key]], "weight_decay": 0.0},
    ]
    logger.info(
        "weight decay (%s): %d tensors decay, %d do not", decay, len(groups[0]["params"]), len(groups[1]["params"])
    )
    return [group for group in groups if group["params"]]


NORM = re.compile(r"norm", re.IGNORECASE)  # LayerNorm, RMSNorm, ScaleNorm, AdaptiveLayerNorm, ... of any library
EMBEDDING = re.compile(r"embed", re.IGNORECASE)
EMBEDDING_NAME = re.compile(r"(^|_)(emb|embed|embedding|embeddings|wte|wpe)(_|$)")
MEMORY_NAME = re.compile(
    r"^((memory|register|cls|mask|pooled)_tokens?|mem_k|mem_v|mem_kv|null_k|null_v|null_kv|registers?|queries)$"
)
GAIN_NAME = re.compile(r"(^|_)(scale|gain|gamma|gate|logit)(_params?)?$")  # of several dimensions in some libraries


def is_decayed(name: str, ndim: int, owner: nn.Module) -> bool:
    """Return whether weight decay is for this tensor, of ``ndim`` dimensions: a matrix that multiplies activations.

    Decay pulls towards zero. Zero is not neutral for gains and biases, and rows of tables that are rarely looked up
    would fade without being used. So it leaves alone: norms of every kind (by the type of the module that owns the
    tensor, and by name in libraries that write their own), biases, embeddings, memory tokens and memory keys/values
    (x-transformers#230), gates and scales.
    """
    last = name.rpartition(".")[2]
    if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        return last != "bias"
    kind = type(owner).__name__
    if isinstance(owner, nn.Embedding) or EMBEDDING.search(kind) or EMBEDDING_NAME.search(last):
        return False
    if NORM.search(kind) or MEMORY_NAME.match(last) or GAIN_NAME.search(last):
        return False
    return ndim >= 2 and not last.endswith("bias")


def unsharded_name(name: str) -> str:
    """Return a parameter's name without what FSDP's wrappers add to it."""
    return name.replace("_fsdp_wrapped_module.", "")
