"""The reference with its optimizer's step in a CUDA graph, as a subject: on a GPU, judged by the same clauses.

``python -m conformance run --subject tests.reference.captured:Captured``
"""

import inspect
from dataclasses import replace

from conformance import Recipe
from conformance.subjects.reference import Reference
from reference import TrainConfig
from reference.optimizers.build import find_class


class Captured(Reference):
    """Captures wherever that can be: one GPU, an optimizer with ``capturable``, no loss scaler."""

    name = "reference with capture_step"

    def train_config(self, recipe: Recipe) -> TrainConfig:
        config = super().train_config(recipe)
        capturable = "capturable" in inspect.signature(find_class(config.optimizer)).parameters
        if not capturable or recipe.world_size > 1 or recipe.precision == "16-mixed":
            return config
        chosen = {"foreach", "differentiable", "fused"} & set(config.optimizer_args)
        return config if chosen else replace(config, accelerator="cuda", capture_step=True)
