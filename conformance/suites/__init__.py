"""The clauses, one file per chapter: ``pytest -p conformance.plugin --pyargs conformance.suites --subject ...``.

This file has what several chapters share: recipes, and questions about a trace.
"""

from dataclasses import replace

from conformance.errors import NotApplicable, Violation
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Checkpoint, Trace
from conformance.runs import Runs

ADAMW, SGD, RMSPROP = "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.RMSprop"
ADAMW_8BIT, PAGED_8BIT = "bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"
GROK = "grokadamw.GrokAdamW"
DESCENT = OptimizerChoice.of(SGD, lr=0.1)
"""Plain gradient descent: AdamW hides the scale of gradients."""
EIGHT_BIT = OptimizerChoice.of(ADAMW_8BIT, lr=1e-2)


def shapes(runs: Runs, recipe: Recipe | None = None) -> list[Recipe]:
    """Return a recipe for each model shape that the subject has.

    Raises:
        NotApplicable: if it has none.
    """
    found = [replace(recipe or Recipe(), shape=shape) for shape in runs.shapes()]
    if not found:
        raise NotApplicable("lacks both gpt-shape and llama-shape")
    return found


def everyday(runs: Runs, optimizer: OptimizerChoice = DESCENT) -> Recipe:
    """Return a run as people make them, with all of these that the subject has: microbatches, schedule, evaluation.

    Clauses that share it share its trace.
    """
    recipe = Recipe(microbatch_size=4, updates=6, optimizer=optimizer)
    if runs.has("microbatches"):
        recipe = replace(recipe, microbatch_size=1, microbatches=4)
    if runs.has("schedule"):  # down to a fifth: a stack may refuse a cosine that rises
        recipe = replace(recipe, warmup=2, minimum_lr=optimizer.rate / 5)
    if runs.has("evaluate-every"):
        recipe = replace(recipe, evaluate_every=2)
    elif runs.has("evaluate"):
        recipe = replace(recipe, evaluate=True)
    return recipe


def dropping(runs: Runs, recipe: Recipe, probability: float = 0.1) -> Recipe:
    """Return the same run with dropout, if the subject has some."""
    return replace(recipe, dropout=probability) if runs.has("dropout") else recipe


def clipped(recipe: Recipe, norm: float, factor: float) -> Recipe:
    """Return the same run, with a limit that is a multiple of the norm of its first gradient."""
    return replace(recipe, clip=float(f"{factor * norm:.3g}"))  # round: a stack may print it, or parse it


def on_two_ranks(recipe: Recipe) -> Recipe:
    """Return the same updates on two ranks: half of the microbatches, or of each microbatch, on either."""
    if recipe.microbatches > 1:
        return replace(recipe, world_size=2, microbatches=recipe.microbatches // 2)
    return replace(recipe, world_size=2, microbatch_size=recipe.microbatch_size // 2)


def shuffled() -> Recipe:
    """Return two epochs over eight samples that the stack shuffles, four updates each, a checkpoint every second."""
    return Recipe(samples=8, microbatch_size=2, updates=8, save_every=2)


def shuffled_on_two_ranks() -> Recipe:
    """Return the same epochs on two ranks, two updates each."""
    return replace(shuffled(), world_size=2, updates=4)


def saved(run: Trace, update: int) -> Checkpoint:
    """Return the checkpoint after an update. Raises Violation if nothing was written."""
    found = run.checkpoint(update)
    if found is None:
        raise Violation(f"a checkpoint after update {update}", "no file was written there")
    return found
