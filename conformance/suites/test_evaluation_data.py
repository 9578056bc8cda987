"""EVAL, continued: which validation data is evaluated, and how much each part of it weighs."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from conformance.checks.data import mean_entropy, places_in_document, sample_numbers
from conformance.checks.evaluation import reported_losses, reports
from conformance.clause import clause
from conformance.errors import AdapterFailed, NotApplicable, Violation, quoted
from conformance.recipe import Recipe
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import on_two_ranks
from conformance.suites.test_evaluation import evaluations, reports_mean, reports_mean_of_targets, short, validation


@clause(
    "EVAL-13",
    since="0.2",
    needs=("evaluate", "ignored-validation"),
    why="If every sequence or batch weighs the same however many targets it has, the reported loss changes with the "
    "way in which the data is cut into batches.",
    mend="Add up losses and targets over all batches, leave out those of -100, and divide once. If your stack takes no "
    "such targets, name ignored-validation in lacks.",
    source="huggingface/transformers#41904, decisionintelligence/TFB#66",
    bound="all digits of the number reported (weighed by sequences: 8e-3)",
)
def test_ignored_validation_targets(runs: Runs) -> None:
    """If some targets of the validation data are ignored, the reported loss is the mean over all other targets, each
    with the same weight.
    """
    try:
        reports_mean(short(runs), [runs.trace(short(runs))])
    except Violation:
        raise NotApplicable("what is reported of whole sequences is not the mean either: see EVAL-5") from None
    recipe = replace(short(runs), ignored_validation=True)
    reports_mean_of_targets(runs, recipe, [runs.trace(recipe)])


@clause(
    "EVAL-14",
    since="0.2",
    needs=("evaluate-every", "evaluate-batches"),
    why="If each evaluation takes other batches, or fewer than were asked for, the difference between two losses is "
    "that between two sets of data.",
    mend="Begin each evaluation at the same batch, and count the batches from there. If your stack has no such limit, "
    "name evaluate-batches in lacks.",
    source="jzhang38/TinyLlama#77, verl-project/verl#78",
    bound="the sequences themselves",
)
def test_limited_evaluation(runs: Runs) -> None:
    """If the number of batches in an evaluation is limited, each evaluation takes exactly that many, the same ones each
    time, and reports the mean over them.
    """
    recipe = replace(short(runs), evaluate=False, evaluate_every=1, evaluate_batches=2)
    assert recipe.evaluate_batches is not None
    run, rows, count = runs.trace(recipe), validation(recipe), recipe.evaluate_batches * recipe.microbatch_size
    runs.require_read(recipe, "evaluate_batches", "evaluate-batches")
    seen: dict[int, set[int]] = {update: set() for update in range(1, recipe.updates + 1)}
    for forward in evaluations(recipe, run):
        numbers = {number for number in sample_numbers(forward.ids, rows) if number is not None}
        seen.setdefault(forward.update, set()).update(numbers)
    for update, numbers in seen.items():
        if len(numbers) != count:
            raise Violation(
                f"{recipe.evaluate_batches} of {len(rows) // recipe.microbatch_size} batches in every evaluation, "
                f"{count} sequences",
                f"{len(numbers)} sequences after update {update}",
            )
        if numbers != seen[1]:
            raise Violation(
                f"the same {recipe.evaluate_batches} batches in every evaluation",
                f"sequences {quoted(sorted(seen[1]))} after update 1, {quoted(sorted(numbers))} after update {update}",
            )
    reports_mean(recipe, [run])


def in_windows(runs: Runs) -> Recipe:
    """Return the run that evaluates a document, which the stack divides into windows."""
    return replace(short(runs), validation="document")


def entropies_by_place(recipe: Recipe, traces: Sequence[Trace]) -> dict[int, list[float]]:
    """Return the cross entropies of each target, by its place in the validation document, after the last update."""
    found: dict[int, list[float]] = {}
    document = recipe.validation_document()
    document = torch.cat((document, torch.tensor([recipe.vocab_size - 1])))  # which may be appended as its end
    for forward in (f for run in traces for f in run.forwards if not f.grad_enabled and f.update == recipe.updates):
        for logits, ids in zip(forward.scores, forward.ids.long(), strict=True):
            first, length = places_in_document(ids, document)
            for place in range(first + 1, first + length + 1):
                if place < len(document):
                    entropy = mean_entropy(
                        logits[None, place - first - 1 : place - first], document[None, place : place + 1]
                    )
                    found.setdefault(place, []).append(entropy)
    return found


def covers(recipe: Recipe, found: dict[int, list[float]], word: str) -> None:
    """Check that all tokens but the first are targets; where the tail is dropped, those of the whole windows."""
    length = len(recipe.validation_document())
    wanted = range(1, length if word == "short" else length // recipe.block_size * recipe.block_size)
    if lost := [place for place in wanted if place not in found]:
        raise Violation(
            f"each of {len(wanted)} tokens of the validation document is a target at least once",
            f"{len(lost)} are not: {quoted(lost, limit=6)}",
        )


def tail(runs: Runs) -> str:
    """Return what happens to the tail of a validation document. Raises NotApplicable if the policy does not say."""
    word = runs.policy.leftovers(in_windows(runs), "tail")
    if word not in ("short", "dropped"):
        raise AdapterFailed(f"policy.leftovers() returned {word!r}: of a tail choose short or dropped")
    return word


@clause(
    "EVAL-15",
    since="0.2",
    needs=("evaluate", "validation-document"),
    why="What fills no window is never evaluated, and of a short document that may be most of it.",
    mend="Fill the last window up, with targets that are ignored, or evaluate a shorter one. If the tail is meant to "
    "be left out, declare it: leftovers(recipe, 'tail') is 'dropped'.",
    source="NKI-AI/direct#50, verl-project/verl#7467",
    bound="the tokens themselves; of the loss, all digits of the number reported",
)
def test_windows_of_a_document(runs: Runs) -> None:
    """If the stack divides a validation document into windows, every token but the first is a target, unless the policy
    declares that the tail is dropped, and the reported loss is the mean over all targets.
    """
    recipe, word = in_windows(runs), tail(runs)
    run = runs.trace(recipe)
    runs.require_read(recipe, "validation", "validation-document")
    found = entropies_by_place(recipe, [run])
    covers(recipe, found, word)
    means_once(recipe, found, run)


def means_once(recipe: Recipe, found: dict[int, list[float]], run: Trace) -> None:
    """Check the reported loss, if no target was evaluated twice, as where windows overlap."""
    if not reported_losses(run.messages) or any(len(entropies) > 1 for entropies in found.values()):
        return
    entropies = [found[place][0] for place in sorted(found)]
    try:
        reports(run.messages, fmean(entropies), "targets of the document")
    except Violation:
        if len(recipe.validation_document()) not in found:
            raise
        reports(run.messages, fmean(entropies[:-1]), "targets of the document")  # no end was appended


@clause(
    "EVAL-16",
    since="0.2",
    needs=("evaluate", "validation-document", "two-ranks"),
    why="If all ranks evaluate the windows of the first, the reported loss is that of a part of the data, and more "
    "ranks make the part smaller.",
    mend="Give each rank its own windows, and add up losses and targets over the ranks.",
    source="Lightning-AI/litgpt#1971 (the loss of rank 0)",
    bound="as EVAL-15",
)
def test_windows_on_two_ranks(runs: Runs) -> None:
    """If the stack divides a validation document into windows, two ranks together evaluate the tokens that one process
    evaluates, and rank 0 reports the mean over them.
    """
    alone, recipe = in_windows(runs), on_two_ranks(replace(in_windows(runs), microbatch_size=4))
    traces, whole = runs.ranks(recipe), entropies_by_place(alone, [runs.trace(alone)])
    if not whole:
        raise NotApplicable("one process evaluates no token of the document: see EVAL-15")
    found = entropies_by_place(recipe, traces)
    if lost := sorted(set(whole) - set(found)):
        raise Violation(
            f"the {len(whole)} targets that one process evaluates, on one rank or the other",
            f"{len(lost)} on neither rank: {quoted(lost, limit=6)}",
        )
    means_once(recipe, found, traces[0])
