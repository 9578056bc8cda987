"""LR: every update has the learning rate that was declared for it."""

from dataclasses import replace

from conformance.checks.schedule import rates_are
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, describe_error
from conformance.recipe import OptimizerChoice, Recipe
from conformance.runs import Runs
from conformance.suites import asked_for, each_unless_refused, every_day, everyday, on_two_ranks, rates, seen, setting


@clause(
    "LR-1",
    since="0.1",
    needs=("schedule",),
    why="A warm-up that ends too early, or a decay that ends too late, is not the experiment that was configured.",
    mend="Count optimizer updates, not microbatches, in warm-up and decay.",
    source="Lightning-AI/litgpt b78ebcb6, e38704e6; huggingface/accelerate#963, burn#5695",
    bound="1e-6 relative (healthy: 1e-16; weakest mutant, a minimum of its own: 0.03)",
)
def test_rates_as_declared(runs: Runs) -> None:
    """Every update has the declared learning rate, through warm-up and cosine, with one microbatch or several, in 32
    and in 16 bits.
    """
    split = everyday(runs)
    variants = [split, replace(split, microbatch_size=split.update_size, microbatches=1)]
    variants.append(Recipe(updates=5, warmup=3, optimizer=OptimizerChoice()))  # constant after the warm-up
    each_unless_refused([*variants, *every_day(runs)[1:]], lambda recipe: has_declared_rates(runs, recipe))


def has_declared_rates(runs: Runs, recipe: Recipe) -> None:
    """Check the learning rates of the run of a recipe."""
    what = f"learning rates, with a warm-up of {recipe.warmup} and {recipe.microbatches} microbatches per update,"
    run = seen(runs.trace(recipe))
    rates_are(asked_for(recipe, run), rates(runs, recipe, run), setting(recipe) + what)


@clause(
    "LR-2",
    since="0.1",
    needs=("schedule", "two-ranks"),
    why="A schedule that advances once for each rank ends before the training does.",
    mend="Step the scheduler once per update, and do not divide its length by the number of ranks.",
    source="axolotl#1566, burn#5695, huggingface/diffusers#2632",
    bound="as LR-1",
)
def test_rates_on_two_ranks(runs: Runs) -> None:
    """On two ranks, every update has the same learning rate as in one process."""
    recipe = everyday(runs)
    for run in runs.ranks(on_two_ranks(recipe)):
        groups = asked_for(recipe, seen(run))
        rates_are(groups, rates(runs, recipe, run), f"learning rates on rank {run.rank}")


@clause(
    "LR-3",
    since="0.1",
    needs=("schedule",),
    level="should",
    why="An update with a rate of zero is wasted, and every later rate comes one update late.",
    mend="Start the warm-up at peak / (warm-up + 1) or at peak / warm-up.",
    source="nanoGPT dc81cb36, huggingface/transformers#34754, torchtune#2010, torchtitan#1261",
    bound="a rate above zero, and some weight that moves",
)
def test_first_update_moves(runs: Runs) -> None:
    """The first update of a warm-up already moves the weights."""
    run = runs.trace(Recipe(updates=5, warmup=3, optimizer=OptimizerChoice()))
    first = run.update(0)
    rate = max((float(group.settings.get("lr", 0.0)) for group in first.groups), default=0.0)
    if rate <= 0 or all(bool((tensor == first.after[name]).all()) for name, tensor in first.before.items()):
        raise Violation("a first update that moves the weights", f"its learning rate is {rate:g}")


EDGES = {
    "no warm-up": Recipe(updates=4, warmup=0, minimum_lr=1e-3),
    "a single update": Recipe(updates=1, warmup=0, minimum_lr=1e-3),
    "a warm-up as long as the run": Recipe(updates=3, warmup=3, minimum_lr=1e-3),
    "a warm-up that leaves one update": Recipe(updates=3, warmup=2, minimum_lr=1e-3),
    "a lowest rate of 0": Recipe(updates=4, warmup=1, minimum_lr=0.0),  # which is no setting left out
}


@clause(
    "LR-4",
    since="0.2",
    needs=("schedule",),
    why="In a short run, or one without a warm-up, a schedule may divide by zero or leave the declared range; a lowest "
    "rate of 0 may pass for one that was not given.",
    mend="Try your schedule with no warm-up, with one update, and with a warm-up as long as the run. Ask whether a "
    "setting is None, not whether it is true.",
    source="karpathy/nanoGPT get_lr (divides by the length of the decay), nanoGPT dc81cb36; unslothai/unsloth-zoo#818 "
    "(a zero is taken for a missing setting)",
    bound="as LR-1; or an error before the first update",
)
def test_rates_at_the_edges(runs: Runs) -> None:
    """With no warm-up, with a single update, with a warm-up as long as the run, and with a lowest rate of 0, every
    update has the declared learning rate, or the stack refuses the settings.
    """
    judged = 0
    for what, recipe in EDGES.items():
        tried = runs.attempt(recipe)
        if tried.error is not None and not tried.trace.updates:
            continue  # refused
        if tried.error is not None:
            raise Violation(
                f"with {what}, {recipe.updates} updates, or an error before the first",
                f"{describe_error(tried.error)}, after {len(tried.trace.updates)} updates",
            )
        run = seen(runs.trace(recipe))
        try:
            declared = rates(runs, recipe, run)
        except ZeroDivisionError:  # the policy's formula has no value there
            continue
        rates_are(asked_for(recipe, run), declared, f"with {what}, learning rates")
        judged += 1
    if not judged:
        raise NotApplicable("the stack refuses such runs, or its policy declares no rate for them")


@clause(
    "LR-5",
    since="0.2",
    needs=("schedule", "cooldown"),
    why="A cooldown that is longer, shorter or of another form than was configured ends with another model.",
    mend="Count the updates of the cooldown back from the last one. If your stack has no such setting, name cooldown "
    "in lacks.",
    source="mlc-ai/pith-train#55 (the length of the decay), karpathy/nanochat#513, kozistr/pytorch_optimizer#382",
    bound="as LR-1",
)
def test_cooldown_as_declared(runs: Runs) -> None:
    """If the learning rate is constant until a cooldown of a given length, every update has the declared rate."""
    recipe = replace(everyday(runs), cooldown=3)
    run = seen(runs.trace(recipe))
    declared = rates(runs, recipe, run)
    if declared == rates(runs, replace(recipe, cooldown=None), run):
        raise NotApplicable("the policy declares the same rates with a cooldown as without one")
    rates_are(asked_for(recipe, run), declared, f"with a cooldown of {recipe.cooldown} updates, learning rates")
