"""EVAL, continued: when the stack evaluates."""

from dataclasses import replace

from conformance.checks.data import sample_numbers
from conformance.checks.evaluation import reported_losses
from conformance.clause import clause
from conformance.errors import Violation, quoted
from conformance.recipe import Recipe
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import everyday
from conformance.suites.test_evaluation import evaluations, reports_mean, short, validation


def evaluated_after(recipe: Recipe, run: Trace) -> list[int]:
    """Return the numbers of updates that were done when validation data was evaluated."""
    rows = validation(recipe)
    quiet = [forward for forward in run.forwards if not forward.grad_enabled]
    return sorted({f.update for f in quiet if any(n is not None for n in sample_numbers(f.ids, rows))})


@clause(
    "EVAL-17",
    since="0.2",
    needs=("evaluate-every", "final-evaluation"),
    why="The loss that is reported last is that of an earlier model than the one that is saved, and a run that is "
    "shorter than the interval has none.",
    mend="Evaluate after the last update, too, unless the interval has just led to an evaluation. If your stack "
    "evaluates at the interval only, name final-evaluation in lacks.",
    source="huggingface/transformers#44146, PrimeIntellect-ai/prime-rl#835 (no evaluation at the end)",
    bound="the sequences themselves; of the loss, all digits of the number reported",
)
def test_evaluation_after_the_last_update(runs: Runs) -> None:
    """If the interval between evaluations does not divide the number of updates, the stack also evaluates after the
    last update, and reports that loss.
    """
    for updates, every in ((3, 2), (2, 3)):
        recipe = replace(short(runs), updates=updates, evaluate=False, evaluate_every=every)
        try:
            evaluations(recipe, runs.trace(recipe))
        except Violation as violation:
            wanted = f"{updates} updates, evaluated every {every}: {violation.expected}"
            raise Violation(wanted, violation.seen) from None
    if not reported_losses(runs.trace(recipe).messages):
        return
    try:
        reports_mean(everyday(runs), [runs.trace(everyday(runs))])
    except Violation:
        return  # what is reported where the interval divides the updates is not the mean either: see EVAL-5
    reports_mean(recipe, [runs.trace(recipe)])


@clause(
    "EVAL-18",
    since="0.2",
    needs=("evaluate-every",),
    why="If evaluations come an update early or late, or their interval is counted in microbatches, they are not those "
    "of the checkpoints with the same number, and two runs are compared at different lengths.",
    mend="Count optimizer updates that are done, and evaluate after each multiple of the interval.",
    source="OpenRLHF/OpenRLHF#131 (log, evaluation and save steps are counted wrongly)",
    bound="the number of updates done before each evaluation",
)
def test_evaluations_at_the_interval(runs: Runs) -> None:
    """In a run that is to evaluate every k updates, the stack evaluates after each multiple of k updates, and at no
    other time but before the first update and after the last.
    """
    for recipe in (everyday(runs), replace(short(runs), updates=3, evaluate=False, evaluate_every=2)):
        every, run = recipe.evaluate_every, runs.trace(recipe)
        assert every is not None
        wanted = [update for update in range(1, recipe.updates + 1) if update % every == 0]
        found = evaluated_after(recipe, run)
        lost = [update for update in wanted if update not in found]
        more = [update for update in found if update not in (0, *wanted, recipe.updates)]
        if lost or more:
            raise Violation(
                f"of {recipe.updates} updates, evaluated every {every}, an evaluation after updates {quoted(wanted)}",
                f"evaluations after updates {quoted(found)}" if found else "no evaluation",
            )
