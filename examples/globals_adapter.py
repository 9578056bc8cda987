"""The adapter of globals_script.py: python -m conformance run --subject examples/globals_adapter.py:Globals

`python -m conformance new-adapter examples/globals_script.py` wrote most of it, and asked for the rest.
"""

import math
import os
from pathlib import Path

from conformance import Constant, Normal, Recipe, TensorInfo, everything_but
from conformance.scripts import run_script

SCRIPT = Path(__file__).parent / "globals_script.py"


class Globals:
    name, version = "globals script", "1"
    lacks = everything_but(
        *("gpt-shape", "microbatches", "clip", "resume", "two-ranks"),
        reason="globals_script.py has no such setting",
    ) | {
        "any-optimizer": "globals_script.py makes an AdamW itself",
        "keywords": "globals_script.py sets betas itself, and has no setting for other arguments of AdamW",
    }

    def __init__(self) -> None:
        self.policy = Policy()

    def train(self, recipe: Recipe) -> None:
        batches = recipe.batches(int(os.environ.get("RANK", "0")))  # those of this process
        settings = {
            "vocab_size": recipe.vocab_size,
            "block_size": recipe.block_size,
            "n_layer": recipe.n_layer,
            "n_head": recipe.n_head,
            "n_embd": recipe.n_embd,
            "batch_size": recipe.microbatch_size,
            "accumulation": recipe.microbatches,
            "max_iters": recipe.updates,
            "learning_rate": recipe.optimizer.rate,
            "weight_decay": dict(recipe.optimizer.arguments).get("weight_decay", 0.0),
            "grad_clip": recipe.clip or math.inf,
            "save_every": recipe.save_every or recipe.updates,
            "get_batch": lambda number: (batches[number][:, :-1], batches[number][:, 1:]),
        }
        arguments = ["--seed", recipe.seed]
        if recipe.resume is not None:
            arguments += ["--resume", str(recipe.resume.find("globals.pt"))]
        run_script(SCRIPT, arguments, settings, folder=recipe.directory)


class Policy:
    """What globals_script.py means to do: the suite judges by nothing else."""

    def initial(self, recipe: Recipe, tensor: TensorInfo) -> Constant | Normal:
        if len(tensor.shape) >= 2:
            return Normal(0.0, 0.02)
        return Constant(1.0 if "norm" in tensor.name and tensor.name.endswith("weight") else 0.0)

    def decays(self, recipe: Recipe, tensor: TensorInfo) -> bool:
        return len(tensor.shape) >= 2

    def learning_rate(self, recipe: Recipe, update: int) -> float:
        return recipe.optimizer.rate
