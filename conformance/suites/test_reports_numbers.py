"""REPORT, continued: to which updates the numbers that a run reports belong."""

from statistics import fmean

from conformance.checks.evaluation import reported_losses
from conformance.checks.reports import (
    by_number,
    is_rounded,
    matches_by_chance,
    numbered_alike,
    training_losses,
)
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation
from conformance.recipe import Recipe
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import everyday
from conformance.suites.test_evaluation import loss_after
from conformance.suites.test_evaluation_times import evaluated_after
from conformance.suites.test_reports import measured_losses, reported_updates, update_losses

Window = tuple[int, int]
"""Of updates in a row: the first, counted from 0, and the one behind the last."""


def windows_of(losses: list[float]) -> dict[Window, float]:
    """Return the mean loss of all updates in a row, by the first and the one behind the last."""
    ends = [(first, last) for last in range(1, len(losses) + 1) for first in range(last)]
    return {(first, last): fmean(losses[first:last]) for first, last in ends}


def told_apart(runs: Runs, recipe: Recipe, run: Trace) -> tuple[list[str], dict[Window, float]]:
    """Return the training losses that a run reports, and the mean of all updates in a row.

    Raises:
        NotApplicable: if it reports none, or one cannot tell of which updates a number is.
    """
    found, means = reported_updates(runs, recipe, [run]), windows_of(update_losses(recipe, [run]))
    if runs.policy.auxiliary_loss(recipe):
        raise NotApplicable("the policy declares that the loss has terms besides the cross entropy")
    if matches_by_chance(found, list(means.values())) > 0.1:
        raise NotApplicable("the losses of the updates are too close to each other to tell which one is reported")
    return found, means


@clause(
    "REPORT-8",
    since="0.2",
    level="should",
    why="A mean over all that was trained so far hides what happens now: it falls for long after the loss has begun to "
    "rise, and a single bad batch raises it for ever.",
    mend="Report the loss of the update, or the mean since the last report. If you want a smoothed curve, report it "
    "under a name of its own beside that one.",
    source="kohya-ss/musubi-tuner#79, allenai/allennlp#1706 (an average over all that was trained so far)",
    bound="all digits of the number reported",
)
def test_reported_losses_are_of_their_own_time(runs: Runs) -> None:
    """If the run reports its training loss several times, not every number is a mean over all updates so far."""
    recipe = everyday(runs)
    run = runs.trace(recipe)
    found, means = told_apart(runs, recipe, run)
    matching = {text: [window for window, mean in means.items() if is_rounded(text, mean)] for text in found}
    since_start = [text for text, windows in matching.items() if any(w[0] == 0 and w[1] > 1 for w in windows)]
    if len(since_start) > 1 and all(first == 0 for windows in matching.values() for first, _ in windows):
        raise Violation(
            "a training loss of later updates alone, such as " + f"{means[len(run.updates) - 1, len(run.updates)]:.4f}",
            f"each number is the mean since the first update: {', '.join(since_start)}",
        )


Numbered = list[tuple[int, list[str]]]
"""The number of an update, and what is reported with it, as it was written."""


def belong(pairs: Numbered, values: dict[int, list[float]], what: str) -> bool:
    """Check that losses are reported with the numbers of their updates, and return whether one could tell.

    Args:
        pairs: what is reported.
        values: what the loss of each update may be, by its number, counted from 1.
        what: is reported, for the message.
    """
    every, texts = [value for each in values.values() for value in each], [text for _, told in pairs for text in told]
    if not every or not all(any(is_rounded(text, value) for text in told for value in every) for _, told in pairs):
        return False
    if matches_by_chance(texts, every) > 0.1:
        return False
    numbered_alike(pairs, values, what)
    return True


@clause(
    "REPORT-9",
    since="0.2",
    level="should",
    why="If the numbers beside the curve count something else, two runs are laid over each other at the wrong place, "
    "and a loss cannot be found again in the checkpoint with its number.",
    mend="Count optimizer updates, and report each number with the update that it was computed in.",
    source="awslabs/slapo#31, deepspeedai/DeepSpeed#2603 (what is counted as a step is a microbatch)",
    bound="equality of the numbers; of the losses, all digits reported",
)
def test_numbers_count_updates(runs: Runs) -> None:
    """The step or update that a run reports with a training or validation loss is the number of the update that the
    loss is of, counted from 1 or from 0.
    """
    recipe = everyday(runs)
    run = runs.trace(recipe)
    trained, evaluated = by_number(run.messages, training_losses), by_number(run.messages, reported_losses)
    if not trained and not evaluated:
        raise NotApplicable("no message gives a step or an update beside a loss")
    for word, pairs in [*trained.items(), *evaluated.items()]:
        if beyond := [number for number, _ in pairs if number > recipe.updates]:
            raise Violation(
                f"{word} {recipe.updates} or {recipe.updates - 1} as the last one", f"it is {word} {max(beyond)}"
            )
    measured, means = measured_losses(recipe, [run]), windows_of(update_losses(recipe, [run]))
    ends = {end: [mean for (_, last), mean in means.items() if last == end] for end in range(1, recipe.updates + 1)}
    judged = []
    for pairs in trained.values():
        own = [(n, [t for t in told if not any(is_rounded(t, loss) for loss in measured)]) for n, told in pairs]
        judged.append(belong([(number, told) for number, told in own if told], ends, "training losses"))
    if evaluated:
        try:
            after = {update: [loss_after(recipe, [run], update)] for update in evaluated_after(recipe, run)}
        except Violation:  # it does not evaluate the validation data after the last update: see EVAL-5
            after = {}
        judged += [belong(pairs, after, "validation losses") for pairs in evaluated.values()]
    if not any(judged):
        raise NotApplicable(
            "the losses beside a step or an update are not those of updates, or too close to tell apart"
        )
