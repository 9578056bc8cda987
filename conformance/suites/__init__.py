"""The clauses, one file per chapter. Run them with pytest: ``pytest --pyargs conformance.suites --subject ...``."""

from dataclasses import replace
from typing import Any

from conformance.clause import NotApplicable
from conformance.recipe import OptimizerChoice, Recipe
from conformance.subject import Subject


def shapes(subject: Subject, **changes: object) -> list[Recipe]:
    """A recipe for each model shape that the subject has, with any field changed.

    Raises:
        NotApplicable: if it has none.
    """
    found = [
        Recipe(shape=shape, **changes)  # type: ignore[arg-type] # the fields are checked by the dataclass's users
        for shape in ("gpt", "llama")
        if f"{shape}-shape" not in subject.lacks
    ]
    if not found:
        raise NotApplicable("lacks both gpt-shape and llama-shape")
    return found


def everyday(subject: Subject, **changes: Any) -> Recipe:
    """A run as people make them, with all of these that the subject has: microbatches, warm-up and cosine, evaluation.

    Plain gradient descent, since AdamW hides the scale of gradients. Clauses that share it share its trace.
    """
    optimizer = changes.get("optimizer", OptimizerChoice.of("torch.optim.SGD", lr=0.1))
    recipe = Recipe(microbatch_size=4, updates=6, optimizer=optimizer)
    if "microbatches" not in subject.lacks:
        recipe = replace(recipe, microbatch_size=1, microbatches=4)
    if "schedule" not in subject.lacks:  # down to a fifth: a stack may refuse a cosine that rises
        recipe = replace(recipe, warmup=2, minimum_lr=dict(optimizer.arguments)["lr"] / 5)
    if "evaluate-every" not in subject.lacks:
        recipe = replace(recipe, evaluate_every=2)
    elif "evaluate" not in subject.lacks:
        recipe = replace(recipe, evaluate=True)
    return replace(recipe, **changes)


def clipped(recipe: Recipe, norm: float, factor: float) -> Recipe:
    """The same run, with a limit that is a multiple of the norm of its first gradient."""
    return replace(recipe, clip=float(f"{factor * norm:.3g}"))  # round: a stack may print it, or parse it


def on_two_ranks(recipe: Recipe) -> Recipe:
    """The same updates on two ranks: half of the microbatches, or of each microbatch, on either."""
    part = "microbatches" if recipe.microbatches > 1 else "microbatch_size"
    return replace(recipe, world_size=2, **{part: getattr(recipe, part) // 2})


def shuffled() -> Recipe:
    """Two epochs over eight samples that the stack shuffles by itself, four updates each, a checkpoint every second."""
    return Recipe(samples=8, microbatch_size=2, updates=8, save_every=2)


def shuffled_on_two_ranks() -> Recipe:
    """The same epochs on two ranks, two updates each."""
    return replace(shuffled(), world_size=2, updates=4)
