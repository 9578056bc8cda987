"""The adapter of plain_loop.py: python -m conformance run --subject examples.plain_loop_adapter:PlainLoop"""

import pydoc

import torch

from conformance import Constant, Normal, Recipe, TensorInfo, Uniform, everything_but
from examples.plain_loop import train


class Policy:
    """What the script declares by saying nothing: torch's own initial weights, one group, a constant rate."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal | Uniform:
        if tensor.owner == "Embedding":
            return Normal(0.0, 1.0)
        if "norm" in tensor.name or tensor.name.endswith(("in_proj_bias", "out_proj.bias")):
            return Constant(1.0 if tensor.name.endswith("weight") else 0.0)
        inputs = 4 * recipe.n_embd if ".linear2." in tensor.name else recipe.n_embd
        bound = (1.5 / inputs) ** 0.5 if tensor.name.endswith("in_proj_weight") else inputs**-0.5  # Xavier for q, k, v
        return Uniform(-bound, bound)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return True

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        return float(dict(recipe.optimizer.arguments)["lr"])


class PlainLoop:
    name, version, policy = "plain loop", "1", Policy()
    lacks = everything_but("gpt-shape", "evaluate", reason="train() in examples/plain_loop.py has no such option")

    def train(self, recipe: Recipe) -> None:
        shape = {"vocabulary": recipe.vocab_size, "context": recipe.block_size, "width": recipe.n_embd}
        shape |= {"layers": recipe.n_layer, "heads": recipe.n_head}
        data = torch.stack(recipe.batches()), torch.cat(recipe.validation_batches())
        optimizer = recipe.optimizer.config()  # {"class_path": ..., "init_args": {...}}, as from a config file
        kind, settings = pydoc.locate(optimizer["class_path"]), optimizer["init_args"]
        train(shape, *data, recipe.directory / "model.pt", recipe.seed, kind, **settings)
