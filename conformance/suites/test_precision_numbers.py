"""PREC, continued: gradients, weights and state of runs that compute in 16 bits, beside those of runs in 32."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from conformance.checks import precision
from conformance.checks.accumulation import gradients_agree
from conformance.checks.finetuning import relative_difference
from conformance.clause import clause
from conformance.errors import NotApplicable, NotWritten, Violation
from conformance.recipe import Recipe
from conformance.recording.snapshot import find_logits
from conformance.runs import Runs
from conformance.suites import each_unless_refused, everyday, setting, tied
from conformance.suites.test_model import QUICK
from conformance.suites.test_precision import COMPUTE, WEIGHTS
from conformance.suites.test_resume import same_from


@clause(
    "PREC-10",
    since="0.2",
    needs=("bf16-mixed",),
    why="Weights in float32 whose values are rounded to 16 bits between the updates lose every small update, as 16-bit "
    "weights do; their dtype shows nothing.",
    mend="Keep the weights that the optimizer steps on, and round copies of them for the forward only.",
    source="pytorch/ao#1124, meta-pytorch/torchtune#2254",
    bound="values that are no 16-bit numbers, in each float32 tensor of 64 elements and more: at the start if it has "
    "such values under 32-true, later if the update before has moved it (a healthy tensor has bfloat16 numbers alone "
    "with a chance of 2^-1024)",
)
def test_weights_keep_their_digits(runs: Runs) -> None:
    """Under a mixed precision, float32 weights start with float32 values and keep them from one update to the next,
    with evaluations and checkpoints in between.
    """
    each_unless_refused(mixed(runs, Recipe()), lambda recipe: keeps_digits(runs, recipe))
    each_unless_refused(mixed(runs, everyday(runs)), lambda recipe: keeps_digits(runs, recipe))
    if runs.has("load"):
        each_unless_refused(mixed(runs, fast(runs)), lambda recipe: keeps_digits(runs, recipe))  # as PREC-13


def mixed(runs: Runs, recipe: Recipe) -> list[Recipe]:
    """Return a run in each mixed precision that the subject has."""
    return [replace(recipe, precision=name) for name in runs.precisions() if name.endswith("-mixed")]


def keeps_digits(runs: Runs, recipe: Recipe) -> None:
    """Check that float32 weights are not rounded at the start, or between two updates."""
    run, narrow = runs.trace(recipe), COMPUTE[recipe.precision]
    precision.starts_not_rounded(runs.trace(replace(recipe, precision="32-true")).initial, run.initial, narrow)
    for number, (update, later) in enumerate(itertools.pairwise(run.updates), start=1):
        precision.not_rounded(update.before, update.after, later.before, f"before update {number + 1}", narrow)


@clause(
    "PREC-12",
    since="0.2",
    needs=("bf16-mixed", "microbatches"),
    why="A gradient that is added up or averaged in 16 bits loses small contributions of microbatches; its dtype does "
    "not show it.",
    mend="Accumulate, reduce and scale gradients of float32 weights in float32.",
    source="deepspeedai/DeepSpeed#2768, linkedin/Liger-Kernel#830, jax-ml/jax#27496, allenai/OLMo#280",
    bound="values that are no 16-bit numbers, in each float32 gradient of 64 elements and more that four microbatches "
    "have given (a healthy one has such numbers alone with a chance below 2^-64)",
)
def test_gradients_keep_their_digits(runs: Runs) -> None:
    """Under a mixed precision, the gradients of float32 weights, added up over several microbatches, hold float32
    values when the optimizer steps.
    """
    each_unless_refused(mixed(runs, everyday(runs)), lambda recipe: has_exact_gradients(runs, recipe))


def has_exact_gradients(runs: Runs, recipe: Recipe) -> None:
    """Check the gradients of each update of a run, unless one backward gives them all."""
    run = runs.trace(recipe)
    for number, update in enumerate(run.updates):
        if sum(loss.update == number for loss in run.losses) < 2:
            raise NotApplicable("the microbatches of an update have one backward together")
        what = f"the gradient of update {number + 1} under {recipe.precision}"
        precision.gradients_not_rounded(update.gradients, COMPUTE[recipe.precision], what)


STALE = 0.1
"""Of the norm of the logits: see PREC-13."""


def fast(runs: Runs) -> Recipe:
    """Return a run whose weights soon are far from where they began, with a checkpoint amid it and one at the end."""
    return Recipe(updates=4, optimizer=QUICK, save_every=2, evaluate=runs.has("evaluate"))


@clause(
    "PREC-13",
    since="0.2",
    needs=("load",),
    why="If a 16-bit copy of the weights is not renewed after each update, the gradient is that of an older model, and "
    "training gets nowhere.",
    mend="Enter autocast again for each forward: while it is on, it keeps the 16-bit copies that it has made. Copy "
    "master weights back after every step.",
    source="X-GenGroup/Flow-Factory#186 (autocast keeps stale copies of the weights), NVIDIA/apex#132",
    bound="0.1 of the norm of the logits (healthy: 3e-3; weakest mutant, copies as old as the first update: 1)",
)
def test_forwards_use_the_weights_of_now(runs: Runs) -> None:
    """In every precision, training and evaluation compute with the current weights: their logits are, within
    rounding, those of the model in the checkpoint that was saved just before.
    """
    recipes = [replace(fast(runs), precision=name) for name in runs.precisions()]
    each_unless_refused(recipes, lambda recipe: computes_with_its_weights(runs, recipe))


def computes_with_its_weights(runs: Runs, recipe: Recipe, bound: float = STALE) -> None:
    """Check that the logits of the forwards that follow a checkpoint are those of the model in it."""
    run, looked = runs.trace(recipe), False
    for done in (2, 4):
        following = [forward for forward in run.forwards if forward.update == done]
        checkpoint = run.checkpoint(done)
        if not following or checkpoint is None:
            continue
        try:
            module = runs.load(checkpoint).float().eval()
        except NotWritten:  # load() reads another file, such as the one of the end
            continue
        if not holds_some(module, run.update(done - 1).after):
            raise NotApplicable("load() gives other weights than the current ones, such as an average of them")
        for forward in following:
            looked = True
            with torch.no_grad():
                expected = find_logits(module(forward.ids.long()))
            if expected is None or expected.shape != forward.scores.shape:
                raise NotApplicable("load() gives a model with other logits than the one that is trained")
            off = relative_difference(expected, forward.scores)
            if not off <= bound:
                what = "training" if forward.training else "evaluation"
                raise Violation(
                    f"{recipe.precision}, {what} after update {done}: the logits of the model in its checkpoint, "
                    f"within {bound:g} of their norm",
                    f"they are {off:.2g} away: computed with other weights",
                )
    if not looked:
        raise NotApplicable("no forward follows a checkpoint of update 2 or 4 that load() reads")


def holds_some(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Return True if a module holds at least one of these tensors, whatever its name, up to the rounding to 16 bits."""
    own = [tensor.detach() for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return any(
        tensor.shape == weight.shape and relative_difference(weight, tensor) < 1e-2
        for weight in weights.values()
        for tensor in own
    )


COARSE_GRADIENT = 0.1
"""Of the gradient vector: see PREC-14."""


@clause(
    "PREC-14",
    since="0.2",
    why="A fault that comes with 16 bits (a loss scale that is not undone, a part whose gradient is lost under "
    "autocast) is the same however an update is split, so only a comparison with 32 bits shows it.",
    mend="Scale and unscale in one place; look for detach() and no_grad() that only run under autocast.",
    source="deepspeedai/DeepSpeed#2768, ISEEKYAN/Megatron-LM#149 (scaled twice, or not at all)",
    bound="0.1 of the gradient vector (healthy: 8e-3; weakest mutant, no gradient of a tied lookup: 0.33)",
)
def test_gradient_in_16_bits_is_that_in_32(runs: Runs) -> None:
    """In bfloat16, the gradient of the first update is that of a run under 32-true, up to rounding, and so it is
    with tied weights.
    """
    plain = everyday(runs)
    names = [name for name in runs.precisions() if name.startswith("bf16")]
    if not names:
        raise NotApplicable("the adapter lacks bf16-mixed and bf16-true")
    recipes = [replace(each, precision=name, updates=1) for each in (plain, *tied(runs, plain)) for name in names]
    short = [replace(each, warmup=0, minimum_lr=None, evaluate=False, evaluate_every=None) for each in recipes]
    each_unless_refused(short, lambda recipe: has_gradient_of_32_bits(runs, recipe))


def has_gradient_of_32_bits(runs: Runs, recipe: Recipe) -> None:
    """Check the first gradient of a run against that of the same run in 32 bits."""
    coarse, exact = runs.trace(recipe), runs.trace(replace(everyday(runs), tied=recipe.tied))
    if any(relative_difference(exact.initial[name], tensor) > 1e-2 for name, tensor in coarse.initial.items()):
        raise NotApplicable("the stack draws other weights in 16 bits, so gradients cannot be compared")
    one, other = exact.update(0).gradients, coarse.update(0).gradients
    gradients_agree(one, other, f"{setting(recipe)}the gradient against that under 32-true", COARSE_GRADIENT)


@clause(
    "PREC-15",
    since="0.2",
    needs=("bf16-mixed", "resume", "load"),
    why="Weights or moments that are saved or loaded in 16 bits lose what a mixed precision keeps 32 bits for, at "
    "every resume.",
    mend="Save what the optimizer steps on, in its own dtype, and load it outside of any cast.",
    source="TensorAuto/OpenTau#185, open-mmlab/mmcv#580 (the state of a resumed 16-bit run)",
)
def test_resume_in_mixed_precision(runs: Runs) -> None:
    """Under a mixed precision, a resumed run has the same parameters as a run that was never interrupted, bit for
    bit.
    """
    each_unless_refused(mixed(runs, fast(runs)), lambda each: same_from(runs, each, 2, f"under {each.precision}"))


@clause(
    "PREC-16",
    since="0.2",
    needs=("evaluate",),
    level="should",
    why="If the validation loss is computed in another precision than the training loss, the two cannot be compared: "
    "what rounding costs is in one of them only.",
    mend="Evaluate inside the same autocast as you train. If you mean to evaluate in float32, say so where the loss is "
    "reported.",
    source="Lightning-AI/lightning-thunder#725, NVIDIA/Megatron-LM#7538 (a forward outside of autocast)",
    bound="the dtype of autocast; autocast to the dtype of the weights casts nothing, and counts as off",
)
def test_evaluation_computes_as_training(runs: Runs) -> None:
    """Evaluation computes in the same precision as training."""
    looked = False
    for name in runs.precisions():
        run = runs.trace(Recipe(precision=name, evaluate=True))  # as PREC-1
        evaluating = [forward for forward in run.forwards if not forward.training and not forward.grad_enabled]
        # To the dtype of the weights autocast casts nothing, as in PREC-4.
        kinds, found = (
            {None if forward.autocast == WEIGHTS[name] else forward.autocast for forward in forwards}
            for forwards in (run.training_forwards(), evaluating)
        )
        looked |= bool(found)
        if found - kinds:
            told = [", ".join(sorted("off" if kind is None else f"to {precision.short(kind)}" for kind in each))
                    for each in (kinds, found)]  # fmt: skip
            raise Violation(
                f"autocast in evaluation as in training, under {name}: {told[0]}", f"in evaluation it is {told[1]}"
            )
    if not looked:
        raise NotApplicable("no forward in eval mode and without gradients was seen")
