"""REPORT: the numbers that a run prints about its training are those of its training."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from conformance.checks.accumulation import total_norm
from conformance.checks.data import IGNORED, sample_numbers, sequence_entropies
from conformance.checks.evaluation import validation_losses_by_step
from conformance.checks.reports import (
    finest,
    gradient_norms,
    in_order,
    is_rounded,
    last_numbers,
    learning_rates,
    matches_by_chance,
    numbers_of_targets,
    one_is_among,
    training_losses,
)
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recipe import Recipe
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import (
    STILL,
    clipped,
    each_unless_refused,
    every_day,
    everyday,
    interrupted,
    mean_of,
    on_two_ranks,
    setting,
    stays_inside,
    tied,
)
from conformance.suites.test_accumulation import in_one_batch
from conformance.suites.test_evaluation import evaluations, mean_over_targets, validation
from conformance.suites.test_resume import resumed


def sequences(recipe: Recipe) -> torch.Tensor:
    """Return the training sequences of all ranks."""
    return torch.cat([batch for rank in range(recipe.world_size) for batch in recipe.batches(rank)])


def update_losses(recipe: Recipe, traces: Sequence[Trace]) -> list[float]:
    """Return the mean cross entropy of the next tokens of each update, over all ranks.

    Raises:
        NotApplicable: if an update trained on other sequences than those of the recipe, or on none.
    """
    rows, run = sequences(recipe), traces[0]
    forwards = [forward for each in traces for forward in each.training_forwards()]
    entropies = [entropy for each in traces for entropy in each.entropies if entropy.grad_enabled]
    if stays_inside(forwards, entropies):
        updates = [[entropy for entropy in entropies if entropy.update == n] for n in range(len(run.updates))]
        return [mean_of(found) for found in updates if found]
    if recipe.ignored_targets:
        labels = torch.cat([batch for rank in range(recipe.world_size) for batch in recipe.labels(rank)])
        parts = [[forward for forward in forwards if forward.update == number] for number in range(len(run.updates))]
        if not all(any(n is not None for f in part for n in sample_numbers(f.ids, rows)) for part in parts):
            raise NotApplicable("no forward on the sequences asked for led to an update: see ACC-6")
        return [mean_over_targets(part, rows, labels) for part in parts]
    losses: list[list[float]] = [[] for _ in run.updates]
    for forward in forwards:
        if forward.update < len(losses):
            for loss in sequence_entropies(forward.scores, forward.ids, rows):
                if loss is None:
                    raise NotApplicable("an update trained on sequences other than those asked for: see ACC-6")
                losses[forward.update].append(loss)
    if not all(losses):
        raise NotApplicable("no forward on the sequences asked for led to an update: see ACC-6")
    return [fmean(found) for found in losses]


def measured_losses(recipe: Recipe, traces: Sequence[Trace]) -> list[float]:
    """Return the mean loss of each evaluation on training data, which a stack may report beside that of updates."""
    rows = sequences(recipe)
    losses: dict[int, list[float]] = {}
    for forward in (forward for run in traces for forward in run.forwards):
        if not forward.grad_enabled and forward.logits is not None:
            found = sequence_entropies(forward.scores, forward.ids, rows)
            losses.setdefault(forward.update, []).extend(loss for loss in found if loss is not None)
    return [fmean(found) for found in losses.values() if found]


def whole_losses(traces: Sequence[Trace]) -> list[float]:
    """Return what backward was called on in each update, summed over its microbatches, and the means of it."""
    losses, updates = [loss for run in traces for loss in run.losses], range(len(traces[0].updates))
    values = [[loss.value.item() for loss in losses if loss.update == update] for update in updates]
    return [sum(found) / len(traces) for found in values] + [fmean(found) for found in values if found]


@clause(
    "REPORT-1",
    since="0.1",
    why="The curve by which people judge the run is not the run's, and it jumps when the batch is split differently.",
    mend="Add up the losses of all microbatches of an update, each weighted as in the gradient.",
    source="huggingface/transformers#35204, pytorch-lightning#2569, allenai/allennlp#4706",
    bound="all digits of the number reported",
)
def test_reported_loss(runs: Runs) -> None:
    """The reported training loss is the mean cross entropy over the targets of one update, or of several in a row, in
    32 and in 16 bits, however many targets each microbatch has.
    """
    each_unless_refused(
        [*every_day(runs), *ragged(runs)], lambda recipe: reports_updates(runs, recipe, [runs.trace(recipe)])
    )


def ragged(runs: Runs) -> list[Recipe]:
    """Return the everyday run with other numbers of targets in each microbatch, for adapters of 0.2, if they can."""
    wanted = runs.has("ignored-targets") and runs.asks("0.2")
    return [replace(everyday(runs), ignored_targets=True)] if wanted else []


def reported_updates(runs: Runs, recipe: Recipe, traces: Sequence[Trace]) -> list[str]:
    """Return the training losses that rank 0 reports, without those that were measured beside the training.

    Raises:
        NotApplicable: if there are none.
    """
    measured, told = measured_losses(recipe, traces), training_losses(traces[0].messages)
    if runs.asks("0.2"):
        told = finest(told)  # the fewer digits, the more numbers are right by chance
    found = [text for text in told if not any(is_rounded(text, loss) for loss in measured)]
    if not found:
        raise NotApplicable("no message of the run gives the training loss of an update")
    return found


def reports_updates(runs: Runs, recipe: Recipe, traces: Sequence[Trace]) -> None:
    """Check that a training loss that rank 0 reports is the mean over all ranks of one update, or of several in a row.

    Raises:
        NotApplicable: if it reports none, or one cannot tell.
    """
    found, losses = reported_updates(runs, recipe, traces), update_losses(recipe, traces)
    # The run may report the sum of all terms instead. Where it weighs microbatches alike in the gradient, too, its
    # report is right, and the gradient is for ACC-2.
    if runs.policy.auxiliary_loss(recipe) or recipe.ignored_targets:
        losses += whole_losses(traces)
    windows = [losses[first:last] for last in range(1, len(losses) + 1) for first in range(last)]
    means = [fmean(window) for window in windows]
    right = [text for text in found if any(is_rounded(text, mean) for mean in means)]
    if 0 < 2 * len(right) < len(found) and matches_by_chance(found, means) > 0.1:  # those few may be right by chance
        raise NotApplicable("the losses of the updates are too close to each other to tell which one is reported")
    one_is_among(
        found,
        means,
        f"{setting(recipe)}a training loss of {losses[0]:.4f} for the first update, {losses[-1]:.4f} for the last, or "
        "a mean of updates" + (f", over all {len(traces)} ranks" if len(traces) > 1 else ""),
    )


@clause(
    "REPORT-2",
    since="0.1",
    needs=("schedule",),
    level="should",
    why="The schedule shown is not the one that was trained with; after a restart it can be off by the whole range.",
    mend="Read the rate before the scheduler moves on to the next one.",
    source="huggingface/transformers#35942, catalyst-team/catalyst#60",
    bound="all digits of the number reported",
)
def test_reported_rate(runs: Runs) -> None:
    """The last learning rate that the run reports is one that an update had; if it reports one for every update, each
    is that of its update.
    """
    # Three rates, and the next is another one; with digits enough to tell them apart.
    step = replace(everyday(runs).optimizer, arguments=(("lr", 0.0987),))
    run = runs.trace(replace(everyday(runs, step), updates=3, warmup=3, minimum_lr=None))
    found = learning_rates(run.messages)
    if not found:
        raise NotApplicable("no message of the run gives a learning rate")
    rates = [float(group.settings["lr"]) for update in run.updates for group in update.groups if "lr" in group.settings]
    one_is_among(found[-1:], rates, f"one of the rates {', '.join(dict.fromkeys(f'{rate:.4g}' for rate in rates))}")
    if runs.asks("0.2"):
        in_order(found, list(dict.fromkeys(rates)), "the learning rates")


@clause(
    "REPORT-3",
    since="0.1",
    needs=("clip",),
    level="should",
    why="A norm that never exceeds the limit hides that every update is clipped; one rank's own norm is too small.",
    mend="Report what clip_grad_norm_ returns: the norm of the whole gradient before scaling.",
    source="ray-project/ray#4965, radixark/miles_diffusion#35 (a shard's norm), pytorch#1032",
    bound="all digits of the number reported",
)
def test_reported_norm(runs: Runs) -> None:
    """The last gradient norm that the run reports is that of a whole gradient, before clipping, with one microbatch and
    with several, and with tied weights; if it reports one for every update, each is that of its update.
    """
    # So that the gradients are those of a run that clips none.
    still = replace(everyday(runs).optimizer, arguments=(("lr", STILL),))
    plain = Recipe(optimizer=still, microbatch_size=4)
    split = [replace(plain, microbatch_size=1, microbatches=4)] if runs.has("microbatches") and runs.asks("0.2") else []
    each_unless_refused([plain, *split, *tied(runs, plain)], lambda recipe: reports_a_norm(runs, recipe))


def reports_a_norm(runs: Runs, recipe: Recipe) -> None:
    """Check that the last norm that a run reports, when it clips, is that of a gradient of the run that does not."""
    norms = [total_norm(update.gradients) for update in runs.trace(recipe).updates]
    run = runs.trace(clipped(recipe, norms[0], 0.1))
    found = gradient_norms(run.messages)
    if not found:
        raise NotApplicable("no message of the run gives a gradient norm")
    listed = ", ".join(f"{norm:.4g}" for norm in norms)
    where = f"{setting(recipe)}with {recipe.microbatches} microbatches"
    one_is_among(found[-1:], norms, f"{where}, one of the norms {listed}")
    if runs.asks("0.2"):
        in_order(found, norms, f"{where}, the norms")


@clause(
    "REPORT-4",
    since="0.2",
    needs=("ignored-targets",),
    why="Speed, budgets and scaling laws are computed from a number of targets that nobody trained on.",
    mend="Count the targets that are not -100, over all microbatches and ranks.",
    source="axolotl-ai-cloud/axolotl#3291 (tokens that were not trained on are counted), Lightning-AI/litgpt#1927 "
    "(other nodes are not)",
    bound="equality",
)
def test_reported_targets(runs: Runs) -> None:
    """If the run reports how many targets an update has, those that are ignored are not among them, those of all ranks
    are, and the number is that of its own update.
    """
    recipe = Recipe(updates=4, ignored_targets=True)
    found = numbers_of_targets(runs.trace(recipe).messages)
    if not found:
        raise NotApplicable("no message of the run gives a number of targets (target_tokens, trainable_tokens)")
    are_numbers_of_targets(recipe, found)
    if runs.has("two-ranks"):
        recipe = on_two_ranks(in_one_batch(replace(everyday(runs), ignored_targets=True)))  # as ACC-4
        are_numbers_of_targets(recipe, numbers_of_targets(runs.ranks(recipe)[0].messages))


def are_numbers_of_targets(recipe: Recipe, found: Sequence[str]) -> None:
    """Check that numbers are those of the targets of each update, over all microbatches and ranks, or sums of them."""
    labels = [recipe.labels(rank) for rank in range(recipe.world_size)]
    counts = [0] * recipe.updates
    for number, batch in (pair for share in labels for pair in enumerate(share)):
        counts[number // recipe.microbatches] += int((batch[:, 1:] != IGNORED).sum())
    allowed = {*counts, *itertools.accumulate(counts), fmean(counts)}
    if wrong := [text for text in found if float(text) not in allowed]:
        where = f" over {recipe.world_size} ranks" if recipe.world_size > 1 else ""
        raise Violation(
            f"numbers of targets {quoted(counts)}, of the {len(counts)} updates{where}, or their sums",
            f"reported: {quoted(wrong)}",
        )
    numbers, orders = [float(text) for text in found], (counts, [*itertools.accumulate(counts)])
    if len(numbers) == len(counts) and numbers not in orders and set(numbers) != {fmean(counts)}:
        raise Violation(
            f"numbers of targets {', '.join(map(str, counts))}, of the {len(counts)} updates in their order, or their "
            "sums",
            f"reported: {', '.join(found)}",
        )


@clause(
    "REPORT-5",
    since="0.2",
    needs=("evaluate-every",),
    level="should",
    why="A validation loss that is logged again, under an update that was not evaluated, moves the curve to the right "
    "and hides how often the run evaluates.",
    mend="Log the loss where it was computed, and nothing where nothing was.",
    source="mosaicml/composer#3206 (a value of another step is logged)",
    bound="number of updates with a validation loss, against number of evaluations",
)
def test_validation_loss_of_each_evaluation(runs: Runs) -> None:
    """Loggers get a validation loss only with the number of an update after which the stack evaluates."""
    recipe = everyday(runs)
    run = runs.trace(recipe)
    rows = validation(recipe)
    numbers = (number for forward in evaluations(recipe, run) for number in sample_numbers(forward.ids, rows))
    evaluated = max(Counter(number for number in numbers if number is not None).values())
    logged = validation_losses_by_step(run.messages)
    if not logged:
        raise NotApplicable("no logger gets a validation loss with the number of an update")
    again = [step for step, value in logged.items() if any(value == logged[other] for other in logged if other < step)]
    if len(logged) > evaluated and again:
        raise Violation(
            f"a validation loss for each of {evaluated} evaluations",
            f"one at {len(logged)} steps; at {quoted(again)} that of an earlier evaluation",
        )


@clause(
    "REPORT-6",
    since="0.2",
    needs=("resume",),
    level="should",
    why="The curves of a resumed run are drawn over those of the first one, and its checkpoints and logs cannot be "
    "told apart.",
    mend="Save the number of updates, and count on from it in what is reported.",
    source="facebookresearch/ParlAI#2106 (the count of a resumed run begins anew)",
    bound="equality of the last number",
)
def test_numbers_go_on_after_a_resume(runs: Runs) -> None:
    """The last update that a resumed run reports has the same number as in a run that was never interrupted."""
    recipe = interrupted(runs)
    whole = runs.trace(recipe)
    later = resumed(runs, recipe, whole, 2)
    if len(later.updates) != len(whole.updates) - 2:
        raise NotApplicable("the resumed run makes other updates: see RESUME-1")
    expected, seen = last_numbers(whole.messages), last_numbers(later.messages)
    shared = sorted(expected.keys() & seen.keys())
    if not shared:
        raise NotApplicable("no message gives the number of an update beside its loss or its rate")
    for word in shared:
        if expected[word] != seen[word]:
            raise Violation(
                f"{word} {expected[word]} as the last update of the resumed run, too", f"it is {word} {seen[word]}"
            )


@clause(
    "REPORT-7",
    since="0.2",
    needs=("two-ranks",),
    level="should",
    why="The curve shows the share of one rank, which is noisier than the loss that is trained on, and changes with "
    "the number of ranks.",
    mend="Average the loss over the ranks before you report it.",
    source="huggingface/transformers#13681, snowflakedb/ArcticTraining#62 (the training loss is not averaged)",
    bound="all digits of the number reported",
)
def test_reported_loss_on_two_ranks(runs: Runs) -> None:
    """On two ranks, the reported training loss is the mean cross entropy over the targets of both ranks, of one update
    or of several in a row.
    """
    alone, recipe = everyday(runs), on_two_ranks(everyday(runs))
    traces = runs.ranks(recipe)
    try:
        reports_updates(runs, alone, [runs.trace(alone)])
    except Violation:
        raise NotApplicable("what one process reports is not the mean either: see REPORT-1") from None
    reports_updates(runs, recipe, traces)
    for uneven in ragged(runs):
        whole = in_one_batch(uneven)  # as ACC-4
        try:
            reports_updates(runs, whole, [runs.trace(whole)])
        except (NotApplicable, Violation):
            continue
        reports_updates(runs, on_two_ranks(whole), runs.ranks(on_two_ranks(whole)))
