"""LR: every update has the learning rate that was declared for it."""

from dataclasses import replace
from typing import Any

from conformance.checks.schedule import rates_are
from conformance.clause import Violation, clause
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Trace
from conformance.subject import Subject
from conformance.suites import everyday, on_two_ranks

PEAK = OptimizerChoice.of("torch.optim.AdamW", lr=1e-2)


def declared(subject: Subject, recipe: Recipe) -> list[float]:
    """The rate of each update."""
    return [subject.policy.learning_rate(recipe, update) for update in range(recipe.updates)]


def groups(run: Trace) -> list[Any]:
    """The parameter groups of each update."""
    return [update.groups for update in run.updates]


@clause(
    "LR-1",
    needs=("schedule",),
    why="A warm-up that ends too early, or a decay that ends too late, is another experiment than the one configured.",
    mend="Count optimizer updates, not microbatches, in warm-up and decay.",
    source="Lightning-AI/litgpt b78ebcb6, e38704e6; huggingface/accelerate#963, burn#5695",
    bound="1e-6 relative (healthy: 1e-16; weakest mutant, a minimum of its own: 0.03)",
)
def test_rates_as_declared(subject: Subject, trace: Any) -> None:
    """The rate of every update is the declared one, through warm-up and cosine, with one microbatch or several."""
    split = everyday(subject)
    variants = [split, replace(split, microbatch_size=split.update_size, microbatches=1)]
    variants.append(Recipe(updates=5, warmup=3, optimizer=PEAK))  # constant after the warm-up
    for recipe in variants:
        what = f"learning rates, with a warm-up of {recipe.warmup} and {recipe.microbatches} microbatches per update,"
        rates_are(groups(trace(recipe)), declared(subject, recipe), what)


@clause(
    "LR-2",
    needs=("schedule", "two-ranks"),
    why="A schedule that advances with every rank ends before the training does.",
    mend="Step the scheduler once per update, and do not divide its length by the number of ranks.",
    source="axolotl#1566, burn#5695, huggingface/diffusers#2632",
    bound="as LR-1",
)
def test_rates_on_two_ranks(subject: Subject, ranks: Any) -> None:
    """On two ranks the rates are those of one process."""
    recipe = everyday(subject)
    for run in ranks(on_two_ranks(recipe)):
        rates_are(groups(run), declared(subject, recipe), f"learning rates on rank {run.rank}")


@clause(
    "LR-3",
    needs=("schedule",),
    level="should",
    why="An update with a rate of zero is computed for nothing, and all later rates come one update late.",
    mend="Start the warm-up at peak / (warm-up + 1), or at peak / warm-up.",
    source="nanoGPT dc81cb36, huggingface/transformers#34754, torchtune#2010, torchtitan#1261",
    bound="a rate above zero, and some weight that moves",
)
def test_first_update_moves(subject: Subject, trace: Any) -> None:
    """The first update of a warm-up already moves the weights."""
    run = trace(Recipe(updates=5, warmup=3, optimizer=PEAK))
    first = run.updates[0]
    rate = max(float(group.settings.get("lr", 0.0)) for group in first.groups)
    if rate <= 0 or all(bool((tensor == first.after[name]).all()) for name, tensor in first.before.items()):
        raise Violation("a first update that moves the weights", f"its learning rate is {rate:g}")
