"""EVAL, continued: evaluation computes the function that training computes, without dropout, on all it is given."""

from dataclasses import replace

import torch

from conformance.checks.comparison import states_equal, tensors_equal
from conformance.checks.data import sample_numbers
from conformance.checks.dropout import same_function
from conformance.checks.evaluation import modes_agree
from conformance.clause import clause
from conformance.errors import AdapterFailed, NotApplicable, Violation
from conformance.recipe import Recipe
from conformance.recording.trace import Forward
from conformance.runs import Runs
from conformance.suites import (
    DECAYING,
    STILL,
    dropping,
    everyday,
    paired,
    require_still,
)
from conformance.suites.test_evaluation import evaluations, reports_mean, validation


def still(runs: Runs) -> Recipe:
    """Return two updates that move no weight, with an evaluation after the last."""
    return Recipe(optimizer=replace(everyday(runs).optimizer, arguments=(("lr", STILL),)), evaluate=True)


def logits_of(forwards: list[Forward], rows: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the logits of each of these sequences, by its number."""
    return {
        number: logits
        for forward in forwards
        for number, logits in zip(sample_numbers(forward.ids, rows), forward.scores, strict=True)
        if number is not None
    }


@clause(
    "EVAL-8",
    since="0.2",
    needs=("evaluate",),
    why="A block that stays in eval mode trains without dropout from the first evaluation on; one that stays in "
    "training mode makes the validation loss that of another model. The flag of the whole model shows neither.",
    mend="Call train() and eval() on the outermost module, or restore the mode that each submodule had before.",
    source="litgpt finetune/full.py (an early return), huggingface/peft adapters",
    bound="flags of all submodules",
)
def test_modes_of_submodules(runs: Runs) -> None:
    """Every submodule is in eval mode during evaluation, and is back in its own training mode afterwards."""
    recipe = dropping(runs, everyday(runs))
    run, rows = runs.trace(recipe), validation(recipe)
    evaluations(recipe, run)
    training = [
        f for f in run.forwards if f.grad_enabled and not any(n is not None for n in sample_numbers(f.ids, rows))
    ]
    evaluated = [f for f in run.forwards if any(n is not None for n in sample_numbers(f.ids, rows))]
    modes_agree([f.other_mode for f in training], [f.other_mode for f in evaluated])


@clause(
    "EVAL-9",
    since="0.2",
    needs=("evaluate",),
    why="If the two differ, the validation loss is that of a function that nobody trains.",
    mend="Let nothing but dropout depend on the training mode; compare the logits of both modes without dropout.",
    source="pytorch#124464, wenet-e2e/wenet#2699 (kernels with settings of their own in one of the modes)",
    bound="1e-4 of the logits' size (healthy: 0; weakest mutant, another eps of the norms: 2e-2)",
)
def test_evaluation_is_the_trained_function(runs: Runs) -> None:
    """Without dropout, evaluation gives the same logits as training for the same tokens and weights."""
    recipe = replace(still(runs), validate_on_training=True)
    run, rows = runs.trace(recipe), torch.cat(recipe.batches())
    require_still(run)
    last = [
        forward for forward in evaluations(recipe, run) if forward.update == recipe.updates and not forward.training
    ]
    expected, seen = logits_of(run.training_forwards(), rows), logits_of(last, rows)
    both = sorted(expected.keys() & seen.keys())
    if not both:
        raise NotApplicable("no sequence was both trained on and evaluated: see ACC-6 and EVAL-4")
    for number in both:
        same_function(expected[number], seen[number], "evaluation against training, on the same tokens and weights")


@clause(
    "EVAL-10",
    since="0.2",
    needs=("evaluate", "dropout"),
    why="If dropout drops or scales during evaluation, the result is that of another model than the one that will be "
    "used.",
    mend="Check the training flag in every place that drops, including kernels and functional calls.",
    source="nanoGPT 7399dfe3, pytorch#124464, pytorch-image-models#1978",
    bound="1e-4 of the logits' size (healthy: 0; weakest mutant, activations scaled by the share that is kept: 0.6)",
)
def test_dropout_off_in_evaluation(runs: Runs) -> None:
    """With the same weights, evaluation gives the same logits whatever the probability of dropout is."""
    recipe = still(runs)
    rows, found = validation(recipe), []
    for changed in (recipe, dropping(runs, recipe, 0.5)):
        run = runs.trace(changed)
        require_still(run)
        found.append(logits_of([f for f in evaluations(changed, run) if f.update == recipe.updates], rows))
    without, with_some = found
    for number in sorted(without.keys() & with_some.keys()):
        same_function(without[number], with_some[number], "evaluation with dropout configured against without")


@clause(
    "EVAL-11",
    since="0.2",
    needs=("evaluate-every",),
    why="If an evaluation clears or averages the moments, they start over, and only an optimizer with state shows it.",
    mend="Leave the optimizer alone during evaluation; if its weights are swapped for averages, swap them back "
    "exactly.",
    source="facebookresearch/schedule_free#22, kohya-ss/sd-scripts#1250",
)
def test_state_outlives_evaluation(runs: Runs) -> None:
    """With an optimizer that has state, evaluating during training changes neither the parameters nor that state."""
    recipe = everyday(runs, DECAYING)
    run, other = runs.trace(recipe), runs.trace(replace(recipe, evaluate_every=None))
    for number, update, plain in paired(run.updates, other.updates, "as many updates without evaluation as with it"):
        when = f"after update {number}, without evaluation and with it"
        states_equal(plain.state_after, update.state_after, f"optimizer state {when}")
        tensors_equal(plain.after, update.after, f"parameters {when}")


@clause(
    "EVAL-12",
    since="0.2",
    needs=("evaluate",),
    why="The sequences of a small last batch weigh more than others, so the reported loss changes with the batch size.",
    mend="Add up losses and token counts over all batches, and divide once.",
    source="huggingface/transformers#34191 (the same fault in training)",
    bound="all digits of the number reported (mean of means over batches of 2 and 1: 4e-3)",
)
def test_uneven_validation(runs: Runs) -> None:
    """If the last validation batch is smaller than the others, every sequence still has the same weight in the reported
    loss, unless the policy declares something else.
    """
    if runs.policy.leftovers(everyday(runs), "validation") != "weighed":
        raise NotApplicable("the policy declares that a smaller validation batch is not weighed by its tokens")
    try:
        reports_mean(everyday(runs), [runs.trace(everyday(runs))])
    except Violation:
        raise NotApplicable("what is reported of even batches is not the mean either: see EVAL-5") from None
    recipe = replace(
        everyday(runs), microbatch_size=2, microbatches=1, updates=2, warmup=0, minimum_lr=None, uneven=True
    )
    recipe = replace(recipe, evaluate_every=2 if recipe.evaluate_every else None)
    try:
        run = runs.trace(recipe)
    except AdapterFailed as error:  # written before there were smaller batches
        raise NotApplicable(f"the adapter cannot hand over a smaller batch: {error}") from None
    rows = validation(recipe)
    evaluated = logits_of([f for f in evaluations(recipe, run) if f.update == recipe.updates], rows)
    if len(evaluated) != len(rows):
        raise Violation(f"all {len(rows)} validation sequences, in a smaller last batch", f"{len(evaluated)} of them")
    reports_mean(recipe, [run])
