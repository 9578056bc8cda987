"""EVAL: evaluation measures the model on the validation data, and changes nothing."""

from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean

import torch

from conformance.checks.comparison import same, tensors_equal
from conformance.checks.data import (
    IGNORED,
    mean_entropy,
    next_tokens,
    sample_numbers,
    sequence_entropies,
    targets_are_next,
)
from conformance.checks.evaluation import reported_losses, reports
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation
from conformance.recipe import Recipe
from conformance.recording.trace import Forward, Trace
from conformance.runs import Runs
from conformance.suites import (
    STILL,
    dropping,
    each_unless_refused,
    every_day,
    everyday,
    mean_of,
    on_two_ranks,
    paired,
    setting,
    stays_inside,
)


def validation(recipe: Recipe) -> torch.Tensor:
    """Return the validation sequences of all ranks."""
    return torch.cat([batch for rank in range(recipe.world_size) for batch in recipe.validation_batches(rank)])


def evaluations(recipe: Recipe, run: Trace) -> list[Forward]:
    """Return the forwards on validation data. Raises Violation if there are none after the last update."""
    rows = validation(recipe)
    found = [forward for forward in run.forwards if any(n is not None for n in sample_numbers(forward.ids, rows))]
    if not any(forward.update == recipe.updates for forward in found):
        raise Violation(
            "an evaluation on the validation data after the last update",
            f"no forward on validation data after it, and {len(found)} before it",
        )
    return found


def last_loss(recipe: Recipe, traces: list[Trace]) -> float:
    """Return the mean cross entropy of the next tokens over all logits of the last evaluation."""
    return loss_after(recipe, traces, recipe.updates)


def loss_after(recipe: Recipe, traces: list[Trace], update: int) -> float:
    """Return the mean cross entropy of the next tokens over all logits of the evaluation after some updates."""
    rows = validation(recipe)
    last = [forward for run in traces for forward in evaluations(recipe, run) if forward.update == update]
    entropies = [e for run in traces for e in run.entropies if not e.grad_enabled and e.update == update]
    if stays_inside(last, entropies):
        numbers = [sample_numbers(forward.ids, rows) for forward in last]
        targets_are_next(
            [e.labels for e in entropies], [rows[[n for n in found if n is not None]] for found in numbers]
        )
        return mean_of(entropies)
    found = [loss for forward in last for loss in sequence_entropies(forward.scores, forward.ids, rows)]
    known = [loss for loss in found if loss is not None]
    if not known:
        raise Violation(
            f"an evaluation on the validation data after update {update}", "no sequence of it is in the validation data"
        )
    return fmean(known)


@clause(
    "EVAL-1",
    since="0.1",
    needs=("evaluate",),
    why="With dropout on, the validation loss is that of another model; left in eval mode, the rest of the "
    "training has no dropout.",
    mend="Call model.eval() before and model.train() after, under torch.no_grad() or inference_mode().",
    source="nanoGPT 7399dfe3, torchtune#1791; litgpt finetune (an early return that leaves the model in eval mode)",
    bound="flags of the outermost module",
)
def test_modes(runs: Runs) -> None:
    """Evaluation runs in eval mode and without gradients; training runs in training mode, before and after an
    evaluation.
    """
    recipe = everyday(runs)
    run, rows = runs.trace(recipe), validation(recipe)
    evaluations(recipe, run)  # there must be some
    for forward in run.forwards:
        training = all(number is None for number in sample_numbers(forward.ids, rows))
        if training and not forward.grad_enabled:
            continue  # neither: a look at the shapes, or a text that is generated
        if (forward.training, forward.grad_enabled) != (training, training):
            what, state = ("training", "on") if training else ("evaluation", "off")
            raise Violation(
                f"{what} with training mode and gradients {state}",
                f"after update {forward.update} training mode is {'on' if forward.training else 'off'}, and gradients "
                f"are {'on' if forward.grad_enabled else 'off'}",
            )


@clause(
    "EVAL-2",
    since="0.1",
    needs=("evaluate-every",),
    why="If two evaluations differ by chance, they hide what a change of the model is worth.",
    mend="Evaluate the same sequences each time, in eval mode, and draw nothing at random.",
    source="TinyLlama#77, pytorch#124464, nanoGPT#240 (dropout inside attention in eval mode)",
    bound="bit equality of the logits under a learning rate that moves no weight",
)
def test_evaluations_repeat(runs: Runs) -> None:
    """Two evaluations with no update in between use the same sequences and give the same logits."""
    still = replace(everyday(runs).optimizer, arguments=(("lr", STILL),))
    recipe = dropping(runs, Recipe(optimizer=still, evaluate_every=1), 0.5)
    run, rows = runs.trace(recipe), validation(recipe)
    seen: list[dict[int | None, torch.Tensor]] = [
        {
            number: logits
            for forward in evaluations(recipe, run)
            if forward.update == update
            for number, logits in zip(sample_numbers(forward.ids, rows), forward.scores, strict=True)
        }
        for update in (1, 2)
    ]
    if seen[0].keys() != seen[1].keys():
        raise Violation("the same sequences in each evaluation", f"first {sorted(map(str, seen[0]))}, then others")
    different = [number for number in seen[0] if not same(seen[0][number], seen[1][number])]
    if different:
        raise Violation("the same logits, bit for bit", f"{len(different)} of {len(seen[0])} sequences differ")


@clause(
    "EVAL-3",
    since="0.1",
    needs=("evaluate-every",),
    why="The result depends on how often the run evaluates, so runs with different intervals cannot be compared.",
    mend="Evaluate a copy, or put back everything that evaluation changes: dtype, mode, gradients, caches.",
    source="huggingface/transformers bf16_full_eval (casts the model in place); pytorch#112583",
)
def test_changes_nothing(runs: Runs) -> None:
    """Evaluating during training does not change the trained parameters, bit for bit."""
    without_changes(runs, everyday(runs))


def without_changes(runs: Runs, recipe: Recipe) -> None:
    """Check that a run with evaluations and one without have the same parameters."""
    run, other = runs.trace(recipe), runs.trace(replace(recipe, evaluate_every=None))
    for number, update, plain in paired(run.updates, other.updates, "as many updates without evaluation as with it"):
        tensors_equal(plain.after, update.after, f"parameters after update {number}, without evaluation and with it")


@clause(
    "EVAL-4",
    since="0.1",
    needs=("evaluate",),
    why="A validation loss on training data rewards learning by heart, and one on a changing part of the data is "
    "noise.",
    mend="Check the paths and splits of both loaders; evaluate all of the validation data, or always the same part.",
    source="huggingface/transformers#8295, p-doom/jasmine#185, LitData without split_names",
    bound="the sequences themselves",
)
def test_validation_data(runs: Runs) -> None:
    """Evaluation uses all of the validation data and no training data, and training uses no validation data, in 32 and
    in 16 bits.
    """
    each_unless_refused(every_day(runs), lambda recipe: uses_its_own_data(recipe, runs.trace(recipe)))


def uses_its_own_data(recipe: Recipe, run: Trace) -> None:
    """Check that a run evaluates all of the validation data and no training data, and does not train on it."""
    rows = validation(recipe)
    last = [f for f in evaluations(recipe, run) if f.update == recipe.updates]
    seen = {number for forward in last for number in sample_numbers(forward.ids, rows)}
    lost = sorted(set(range(len(rows))) - seen, key=str)
    taught = torch.cat(recipe.batches())  # other ids may be a text that is generated
    other = [f for f in run.forwards if not f.grad_enabled and set(sample_numbers(f.ids, taught)) != {None}]
    if measured_apart(recipe, run):
        other = []
    trained = [f for f in run.forwards if f.grad_enabled and set(sample_numbers(f.ids, rows)) != {None}]
    if lost or other or trained:
        raise Violation(
            f"{setting(recipe)}the {len(rows)} validation sequences, all of them in the last evaluation and none in "
            "training",
            f"not evaluated: {len(lost)}; batches of training data evaluated: {len(other)}; "
            f"batches of validation data trained on: {len(trained)}",
        )


@clause(
    "EVAL-5",
    since="0.1",
    needs=("evaluate",),
    why="People choose models by this number.",
    mend="Compute it as in training: the next token is the target, the mean is over tokens, in float32.",
    source="Lightning-AI/litgpt#419 (targets not shifted), huggingface/transformers#34191",
    bound="all digits of the number reported",
)
def test_reported_loss(runs: Runs) -> None:
    """The reported validation loss is the mean cross entropy of the next tokens over the sequences evaluated, in 32 and
    in 16 bits.
    """
    each_unless_refused(every_day(runs), lambda recipe: reports_mean(recipe, [runs.trace(recipe)]))


def measured_apart(recipe: Recipe, run: Trace) -> bool:
    """Return True if the validation loss that a run reports is that of the validation data alone.

    A stack may also measure the loss on training data, as nanoGPT's estimate_loss does for both splits.
    """
    try:
        reports(run.messages, last_loss(recipe, [run]))
    except Violation:
        return False
    return True


def reports_mean(recipe: Recipe, traces: list[Trace]) -> None:
    """Check that rank 0 reports the mean cross entropy over the last evaluation of all ranks."""
    if not reported_losses(traces[0].messages):
        raise NotApplicable("no message of the run gives a validation loss")
    reports(traces[0].messages, last_loss(recipe, traces), where=setting(recipe))


def short(runs: Runs) -> Recipe:
    """Return two updates in batches of two, after the last of which the stack evaluates."""
    return Recipe(optimizer=everyday(runs).optimizer, evaluate=True)


def reports_mean_of_targets(runs: Runs, recipe: Recipe, traces: list[Trace]) -> None:
    """Check that rank 0 reports the mean over those targets of the last evaluation of all ranks that are not ignored.

    Raises:
        NotApplicable: if it reports no validation loss, or the adapter knows of no such targets.
    """
    if not reported_losses(traces[0].messages):
        raise NotApplicable("no message of the run gives a validation loss")
    if recipe.world_size == 1:
        runs.require_read(recipe, "validation_labels", "ignored-validation")
    labels = torch.cat([batch for rank in range(recipe.world_size) for batch in recipe.validation_labels(rank)])
    last = [f for run in traces for f in evaluations(recipe, run) if f.update == recipe.updates]
    where = f" of {len(traces)} ranks" if len(traces) > 1 else ""
    mean = mean_over_targets(last, validation(recipe), labels)
    reports(traces[0].messages, mean, f"targets{where} that are not ignored")


def mean_over_targets(forwards: Iterable[Forward], rows: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean cross entropy over the targets, that are not ignored, of the sequences that forwards see.

    Args:
        forwards: calls of the model; sequences of theirs that are not among the rows are left out.
        rows: sequences, (N, T + 1).
        labels: their targets.
    """
    total, targets = 0.0, 0
    for forward in forwards:
        for logits, number in zip(forward.scores, sample_numbers(forward.ids, rows), strict=True):
            if number is not None:
                scores, wanted = next_tokens(logits[None], labels[number][None])
                count = int((wanted != IGNORED).sum())
                total, targets = total + mean_entropy(scores, wanted) * count, targets + count
    return total / targets


@clause(
    "EVAL-6",
    since="0.1",
    needs=("evaluate", "two-ranks"),
    why="The number is that of one rank's share of the data: it is noisier, and changes with the number of ranks.",
    mend="Sum losses and counts over the ranks, then divide.",
    source="Lightning-AI/litgpt#1971 (finetune mended; pretrain.validate averages on its own rank only); "
    "PrimeIntellect-ai/prime-rl#1850, pytorch/torchtitan#2206 (the means of the ranks are averaged)",
    bound="all digits of the number reported (the mean of the ranks' means: off by 1.9e-3)",
)
def test_reported_loss_on_two_ranks(runs: Runs) -> None:
    """On two ranks, the reported validation loss is the mean over all validation data, in which each target weighs the
    same on whichever rank it is; together the ranks evaluate all of it.
    """
    recipe = on_two_ranks(everyday(runs))
    traces, rows = runs.ranks(recipe), validation(recipe)
    last = [f for run in traces for f in evaluations(recipe, run) if f.update == recipe.updates]
    lost = set(range(len(rows))) - {number for forward in last for number in sample_numbers(forward.ids, rows)}
    if lost:
        raise Violation(f"all {len(rows)} validation sequences, on one rank or the other", f"{len(lost)} on neither")
    try:
        reports_mean(everyday(runs), [runs.trace(everyday(runs))])
    except Violation:
        raise NotApplicable("what one process reports is not the mean either: see EVAL-5") from None
    reports_mean(recipe, traces)
    if runs.has("ignored-validation") and runs.asks("0.2"):
        weighs_targets_alike(runs)


def weighs_targets_alike(runs: Runs) -> None:
    """Check the loss that is reported where one rank has fewer targets than the other, unless one process fails too."""
    alone = replace(short(runs), ignored_validation=True)
    try:
        reports_mean_of_targets(runs, alone, [runs.trace(alone)])
    except (NotApplicable, Violation):  # see EVAL-13
        return
    recipe = on_two_ranks(alone)
    reports_mean_of_targets(runs, recipe, runs.ranks(recipe))


@clause(
    "EVAL-7",
    since="0.1",
    needs=("evaluate-every", "dropout"),
    level="should",
    why="Runs that differ only in how often they evaluate differ in every weight, so they cannot be compared bit "
    "for bit.",
    mend="Draw dropout from its own generator or seed; a DataLoader draws from the global one at each pass.",
    source="facebookresearch/fairseq2#1038 (random state); torch.utils.data.DataLoader (base seed of its workers)",
)
def test_random_state_is_kept(runs: Runs) -> None:
    """With dropout on, evaluating during training does not change the trained parameters: evaluation does not use up
    random numbers that training would draw.
    """
    without_changes(runs, dropping(runs, everyday(runs)))
