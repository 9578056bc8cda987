"""nn.Embedding -> bitsandbytes StableEmbedding before training, and back to a plain one for inference.

StableEmbedding (https://arxiv.org/abs/2110.02861) puts a LayerNorm behind the lookup and keeps the optimizer state
of the table in 32 bits. So the swap preserves the weights but not the function: it is for runs that start fresh.

Order matters: swap before the optimizer is built, or it owns tensors that the model no longer uses and misses
those that it does. LitGPT's LoRA script swaps afterwards, and then trains neither table nor norm.
"""

import copy
import logging
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference.config import GPTConfig
from reference.errors import ConfigurationError
from reference.model.modes import evaluation_mode

logger = logging.getLogger("reference")


def swap_embeddings(model: nn.Module) -> list[str]:
    """Replace every nn.Embedding of ``model`` in place by a StableEmbedding that shares its weight tensor.

    The weight stays the same Parameter object, so ties survive and nothing is copied or rounded.

    Returns:
        The names of the replaced modules.

    Raises:
        ConfigurationError: if an embedding asks for sparse gradients, which no bitsandbytes optimizer can use.
    """
    # Under all their names: some models reach one embedding by two (T5's ``shared``).
    plain = {n: m for n, m in model.named_modules(remove_duplicate=False) if n and type(m) is nn.Embedding}
    for name, module in plain.items():
        if module.sparse:
            raise ConfigurationError(
                f"the embedding {name!r} has sparse=True, but no bitsandbytes optimizer takes sparse gradients: "
                "build it with sparse=False, or set stable_embedding=False."
            )
    stable = {id(module): stable_embedding(module) for module in plain.values()}
    for name, module in plain.items():
        model.set_submodule(name, stable[id(module)])
    if plain:
        logger.info("embedding: %s trained as StableEmbedding", ", ".join(plain))
    else:
        logger.info("embedding: the model has no nn.Embedding, so none becomes a StableEmbedding")
    return list(plain)


def stable_embedding(plain: nn.Embedding) -> nn.Embedding:
    """Return a StableEmbedding with the weight, the options and the training mode of ``plain``."""
    from bitsandbytes.nn import StableEmbedding

    # Passing the weight spares a second table and its random draw. The norm starts at gain 1 and bias 0.
    stable: nn.Embedding = StableEmbedding(
        plain.num_embeddings,
        plain.embedding_dim,
        padding_idx=plain.padding_idx,
        max_norm=plain.max_norm,
        norm_type=plain.norm_type,
        scale_grad_by_freq=plain.scale_grad_by_freq,
        sparse=plain.sparse,
        _weight=plain.weight,
        device=plain.weight.device,
    )
    # nn.Embedding wraps _weight in a new Parameter: put the old one back, so that ties and requires_grad survive.
    stable.weight = plain.weight
    norm = stable.norm
    assert isinstance(norm, nn.LayerNorm)
    norm.to(plain.weight.dtype)
    norm.requires_grad_(plain.weight.requires_grad)
    # On the meta device the weight is yet to be drawn, from the table of the model, not by StableEmbedding's own rule.
    if isinstance(draw := vars(plain).get("reset_parameters"), partial):
        stable.reset_parameters = partial(draw.func, stable, *draw.args[1:])  # type: ignore[method-assign] # the hook
    return stable.train(plain.training)


def restore_embeddings(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` for inference: every StableEmbedding is a plain nn.Embedding with the same output.

    Row by row the norm is a fixed function, so it folds into the table: ``weight := norm(weight)``. A head that was
    tied to the table keeps the unfolded weight and is untied (logged, and ``config.tie_embeddings`` is set False).

    Raises:
        ConfigurationError: if the logits change, because the model reads the table in another place as well, such as
            a head that multiplies by ``embedding.weight`` without owning it.
    """
    restored = copy.deepcopy(model)
    plain: dict[int, nn.Embedding] = {}
    for name, module in list(restored.named_modules(remove_duplicate=False)):
        if is_stable(module):
            assert isinstance(module, nn.Embedding)
            plain.setdefault(id(module), folded(module))
            restored.set_submodule(name, plain[id(module)])
            shared = [other for other, p in restored.named_parameters() if p is module.weight]
            if shared:
                logger.info("embedding: %s is folded and untied from %s", name, ", ".join(shared))
                if isinstance(config := getattr(restored, "config", None), GPTConfig):
                    restored.config = replace(config, tie_embeddings=False)  # type: ignore[assignment] # a plain attribute
    restored.eval()
    if plain:
        require_equal_logits(model, restored)
    return restored


@torch.no_grad()
def require_equal_logits(model: nn.Module, restored: nn.Module) -> None:
    """Raise ConfigurationError if two models of token ids give different logits for a few of them."""
    weight = next(module.weight for module in model.modules() if is_stable(module))
    assert isinstance(weight, Tensor)
    ids = torch.arange(min(4, weight.size(0)), device=weight.device).unsqueeze(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)  # StableEmbedding computes its norm in the default dtype
    try:
        with evaluation_mode(model):
            expected, seen = model(ids), restored(ids)
    finally:
        torch.set_default_dtype(default)
    error = ((seen - expected).norm() / expected.norm()).item()
    if not error <= max(1e-3, 4 * torch.finfo(weight.dtype).eps):  # 0 on the CPU; a table read elsewhere gives 0.1 to 2
        raise ConfigurationError(
            f"without StableEmbedding the logits change by {error:.1%}: the model reads the embedding's table in "
            "another place too, such as a head tied by a function. Give the head a weight of its own, and train again."
        )


def folded(stable: nn.Embedding) -> nn.Embedding:
    """Return the plain embedding whose lookup gives what that of ``stable`` gives."""
    with torch.no_grad():
        # Without max_norm, which would rescale the folded rows at lookup; it acts on the table before the norm.
        table = stable.weight if stable.max_norm is None else renormed(stable)
        norm = stable.norm
        assert isinstance(norm, nn.LayerNorm)
        weight = norm(table.to(norm.weight.dtype)).to(stable.weight.dtype)
    plain = nn.Embedding(
        stable.num_embeddings,
        stable.embedding_dim,
        padding_idx=stable.padding_idx,
        scale_grad_by_freq=stable.scale_grad_by_freq,
        sparse=stable.sparse,
        _weight=weight,
    )
    plain.weight.requires_grad_(stable.weight.requires_grad)
    return plain


def renormed(embedding: nn.Embedding) -> Tensor:
    """Return the table as a lookup with ``max_norm`` sees it: rows longer than max_norm are shortened to it."""
    table = embedding.weight.detach().clone()
    rows = torch.arange(embedding.num_embeddings, device=table.device)
    functional.embedding(rows, table, max_norm=embedding.max_norm, norm_type=embedding.norm_type)  # shortens in place
    return table


def is_stable(module: nn.Module) -> bool:
    """Return whether this is bitsandbytes' StableEmbedding, told without importing the package."""
    return type(module).__name__ == "StableEmbedding" and type(module).__module__.startswith("bitsandbytes.")
