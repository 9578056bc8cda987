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
from conformance.suites.test_resume import resumed


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
        recipe = uneven(runs, updates, every)
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
    why="If evaluations come an update early or late, they are not those of the checkpoints with the same number, and "
    "two runs are compared at different lengths.",
    mend="Count optimizer updates that are done, and evaluate after each multiple of the interval.",
    source="OpenRLHF/OpenRLHF#131 (log, evaluation and save steps are counted wrongly)",
    bound="the number of updates done before each evaluation",
)
def test_evaluations_at_the_interval(runs: Runs) -> None:
    """In a run that is to evaluate every k updates, the stack evaluates after each multiple of k updates; a resumed run
    does so after the same updates.
    """
    odd = uneven(runs, 3)
    for recipe in (everyday(runs), odd):
        evaluates_when_due(recipe, evaluated_after(recipe, runs.trace(recipe)))
    if runs.has("resume"):
        longer = replace(odd, updates=5)
        try:
            later = resumed(runs, longer, runs.trace(odd), 3)
        except Violation:  # see RESUME-3
            return
        if len(later.updates) == 2:
            evaluates_when_due(longer, [3 + update for update in evaluated_after(longer, later)], 3)


def evaluates_when_due(recipe: Recipe, found: list[int], start: int = 0) -> None:
    """Check that a run evaluates after the updates that its interval divides.

    Args:
        recipe: of the run.
        found: the updates after which it does, counted from the first of all.
        start: updates that were done when it was resumed.
    """
    assert recipe.evaluate_every is not None
    wanted = [update for update in range(start + 1, recipe.updates + 1) if update % recipe.evaluate_every == 0]
    if not set(wanted) <= set(found):  # some evaluate at other times, too: before the first update, or where they save
        where = f", resumed after update {start}" if start else ""
        raise Violation(
            f"in a run of {recipe.updates} updates{where}, evaluated every {recipe.evaluate_every}, an evaluation "
            f"after updates {quoted(wanted)}",
            f"evaluations after updates {quoted(found)}" if found else "no evaluation",
        )


def uneven(runs: Runs, updates: int, every: int = 2) -> Recipe:
    """Return a run whose interval between evaluations does not divide its updates, and a checkpoint at its end."""
    save = updates if runs.has("resume") else None
    return replace(short(runs), updates=updates, evaluate=False, evaluate_every=every, save_every=save)
