"""CLIP: the gradient is clipped as a whole, at the limit, and nothing that is not finite reaches the weights."""

from dataclasses import replace

from conformance.checks.accumulation import gradients_agree, total_norm
from conformance.checks.clipping import CLIP_BOUND, COARSE_BOUND, all_finite, clipped_as_one, states_are_numbers
from conformance.checks.comparison import tensors_equal
from conformance.clause import clause
from conformance.errors import NotApplicable
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.suites import clipped, each_unless_refused, everyday, in_16_bits, on_two_ranks, paired, setting, tied


@clause(
    "CLIP-1",
    since="0.1",
    needs=("clip",),
    why="If a stack clips each tensor or each microbatch alone, the update has the right length and the wrong "
    "direction.",
    mend="Clip once per update, after the last microbatch, over all parameters together.",
    source="huggingface/accelerate#641; torch.nn.utils.clip_grad_norm_ over each tensor",
    bound="1e-4 of the gradient vector (healthy: 1e-6; weakest mutant, per microbatch: 0.88)",
)
def test_clipped_as_one(runs: Runs) -> None:
    """If the gradient's norm over all tensors and microbatches exceeds the limit, the stack scales the whole gradient
    to it, with tied weights too.
    """
    recipe = everyday(runs)
    each_unless_refused([recipe, *tied(runs, recipe)], lambda each: is_clipped_as_one(runs, each))


def is_clipped_as_one(runs: Runs, recipe: Recipe) -> None:
    """Check that a limit of a tenth of the first gradient's norm scales that gradient to it."""
    free = runs.trace(recipe)
    short = clipped(recipe, total_norm(free.update(0).gradients), 0.1)
    assert short.clip is not None
    gradients = free.update(0).gradients, runs.trace(short).update(0).gradients
    shared = [info.name for info in free.tensors.values() if len(info.names) > 1]
    clipped_as_one(*gradients, short.clip, shared=shared, where=setting(recipe))


@clause(
    "CLIP-2",
    since="0.1",
    needs=("clip",),
    why="A stack that scales every gradient to the limit makes every step as long as the largest.",
    mend="Scale by min(1, limit / norm).",
    source="torch.nn.utils.clip_grad_norm_, which clamps the factor at 1",
)
def test_unclipped_below_the_limit(runs: Runs) -> None:
    """A clipping limit above the gradient's norm changes nothing, bit for bit."""
    recipe = everyday(runs)
    free = runs.trace(recipe)
    long = runs.trace(clipped(recipe, total_norm(free.update(0).gradients), 1000.0))
    for number, update, other in paired(free.updates, long.updates, "as many updates with a limit as without one"):
        tensors_equal(
            update.after,
            other.after,
            f"parameters after update {number}, with a limit a thousand times the norm, against no limit",
        )


@clause(
    "CLIP-3",
    since="0.1",
    level="should",
    why="A single overflow in one backward makes every weight NaN, and the run is lost.",
    mend="Check the gradient norm, which clipping computes anyway, before the step; raise an error or skip the step.",
    source="Lightning-AI/pytorch-lightning#21928 (error_if_nonfinite not handed on)",
    bound="no NaN",
)
def test_not_finite(runs: Runs) -> None:
    """A gradient with a NaN or an infinity never reaches the weights or the state of the optimizer."""
    recipe = Recipe(updates=3, clip=1.0 if runs.has("clip") else None)
    runs.trace(recipe)  # a stack that always raises would raise here too
    tried = runs.attempt(replace(recipe, nan_gradient=1))
    for number, update in enumerate(tried.trace.updates, start=1):
        when = f"after update {number}, with one NaN in the gradient of update 2,"
        all_finite(update.after, when)
        if runs.asks("0.2"):
            states_are_numbers(update.state_after, when)


@clause(
    "CLIP-4",
    since="0.1",
    needs=("clip", "two-ranks"),
    why="If a rank clips by the norm of its own gradients, the update is scaled by the wrong factor.",
    mend="Clip the summed gradient by its own norm.",
    source="pytorch#72548, #88955, torchtitan#766",
    bound="1e-5 of the gradient vector (healthy: 5e-8; norm counted twice: 0.29); bit equality between the ranks",
)
def test_clipped_on_two_ranks(runs: Runs) -> None:
    """Two ranks clip exactly as one process does, and agree with each other bit for bit."""
    recipe = everyday(runs)
    short = clipped(recipe, total_norm(runs.trace(recipe).update(0).gradients), 0.1)
    first, second = runs.ranks(on_two_ranks(short))
    tensors_equal(first.update(-1).after, second.update(-1).after, "parameters of rank 0 against rank 1")
    gradients_agree(
        runs.trace(short).update(0).gradients,
        first.update(0).gradients,
        "the gradient clipped on two ranks against one process",
    )


@clause(
    "CLIP-5",
    since="0.2",
    needs=("clip",),
    why="A limit that holds only in float32, or that is compared with gradients that a scaler has multiplied, clips "
    "another gradient than the one that the optimizer uses.",
    mend="Unscale the gradients before clipping, and clip in every precision.",
    source="pytorch.org/docs/stable/notes/amp_examples.html (gradient clipping), huggingface/accelerate#641",
    bound="1e-4 of the gradient vector where gradients are float32 (healthy: 1e-6), 1e-2 where they are rounded to 16 "
    "bits (healthy: 2e-3); not clipped: 9",
)
def test_clipped_in_16_bits(runs: Runs) -> None:
    """In every 16-bit precision, if the gradient's norm exceeds the limit, the stack scales the whole gradient to the
    limit.
    """
    free = runs.trace(everyday(runs)).update(0).gradients
    for recipe in in_16_bits(runs, everyday(runs)):
        limited = clipped(recipe, total_norm(free), 0.1)
        assert limited.clip is not None
        whole, short = (runs.trace(changed).update(0).gradients for changed in (recipe, limited))
        clipped_as_one(whole, short, limited.clip, COARSE_BOUND if recipe.precision.endswith("-true") else CLIP_BOUND)


@clause(
    "CLIP-6",
    since="0.2",
    level="should",
    why="A gradient whose NaN elements are replaced is the gradient of no loss, and the weights follow it.",
    mend="Leave the update out, or end the run; do not replace NaN with zero.",
    source="Lightning-AI/pytorch-lightning#21928; torch.nan_to_num_ on gradients, as many recipes have it",
    bound="bit equality of the weights before and after the update with the NaN",
)
def test_not_finite_is_left_out(runs: Runs) -> None:
    """If the gradient of an update holds a NaN, the stack leaves the update out and all weights as they were, or ends
    the run.
    """
    recipe = Recipe(updates=3, clip=1.0 if runs.has("clip") else None)
    runs.trace(recipe)  # a stack that always raises would raise here too
    tried = runs.attempt(replace(recipe, nan_gradient=1))
    if len(tried.trace.updates) > 1:
        update = tried.trace.updates[1]
        if not all(tensor.isfinite().all() for tensor in update.after.values()):
            raise NotApplicable("the NaN reaches the weights: see CLIP-3")
        tensors_equal(
            update.before, update.after, "parameters before and after the update with one NaN in its gradient"
        )
