"""ACC: an update is that of its sequences, however they are split into microbatches and over ranks, or computed."""

from dataclasses import replace

import torch
from torch import Tensor

from conformance.checks.accumulation import Gradients, gradient_is_of, gradients_agree
from conformance.checks.comparison import tensors_equal
from conformance.checks.data import mean_entropy, next_tokens, sample_numbers, targets_are_next
from conformance.clause import clause
from conformance.errors import AdapterFailed, NotApplicable, Violation
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Named, Trace
from conformance.runs import Runs
from conformance.suites import (
    ADAMW,
    SGD,
    dropping,
    everyday,
    in_16_bits,
    mean_of,
    on_two_ranks,
    paired,
    stays_inside,
)

LATER = 1e-2
"""Of the gradient of a later update: an optimizer's steps make more of rounding, those of Muon most."""


def in_one_batch(recipe: Recipe) -> Recipe:
    """Return the same updates, each with a single microbatch."""
    return replace(recipe, microbatch_size=recipe.update_size, microbatches=1)


def small_step(runs: Runs) -> Recipe:
    """Return two updates on the same batch, in steps so small that the loss falls in a line."""
    step = OptimizerChoice.of(SGD, lr=3e-4) if runs.has("any-optimizer") else OptimizerChoice.of(ADAMW, lr=3e-5)
    return Recipe(optimizer=step, same_batches=True)


def dense(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return those that are there."""
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def every_update_agrees(runs: Runs, one: Trace, other: Trace, what: str) -> None:
    """Check that two runs have the same gradients in their first update, and, up to rounding, in every later one.

    A stack may count targets for the next update, or scale by something that it has not computed yet in the first.
    Where the steps have led to other weights, as they do if the learning rate goes by microbatches, gradients say
    nothing: that is for the chapters OPT and LR.
    """
    gradients_agree(one.update(0).gradients, other.update(0).gradients, what)
    later = zip(one.updates[1:], other.updates[1:]) if runs.asks("0.2") else ()  # how many there are is for ACC-6
    for number, (first, second) in enumerate(later, start=2):
        if apart(moved_by(one, number), moved_by(other, number)) > LATER:
            return
        gradients_agree(first.gradients, second.gradients, f"{what}, in update {number}", LATER)


def moved_by(run: Trace, number: int) -> dict[str, Tensor]:
    """Return how far each trainable tensor has moved from the first update to update ``number``, counted from 1."""
    start, now = run.update(0).before, run.update(number - 1).before
    return {name: now[name].double() - start[name].double() for name in run.trainable}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return how far two movements are apart, as a part of the first; 0 if they move different tensors."""
    if set(one) != set(other):
        return 0.0  # gradients_agree() tells which
    away = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((away / max(sum(float(t.square().sum()) for t in one.values()), 1e-300)) ** 0.5)


@clause(
    "ACC-1",
    since="0.1",
    needs=("microbatches",),
    why="A gradient that is too large or too small by the number of microbatches acts as another learning rate.",
    mend="Divide the loss of each microbatch by the number of microbatches, or all losses by the number of target "
    "tokens.",
    source="karpathy/nanoGPT#168, #206; huggingface/transformers#37766, #35438",
    bound="1e-5 of the gradient vector (healthy: 1.4e-7; the last microbatch only: 0.87; not divided: 3); in later "
    "updates 1e-2 (healthy: 2.1e-7, under AdamW 2.8e-7, under Muon 1.4e-3)",
)
def test_split_into_microbatches(runs: Runs) -> None:
    """In every update, accumulating k microbatches gives the same gradient as one batch of the same sequences."""
    split = everyday(runs)
    what = f"{split.microbatches} microbatches against one batch"
    every_update_agrees(runs, runs.trace(in_one_batch(split)), runs.trace(split), what)


@clause(
    "ACC-2",
    since="0.1",
    needs=("microbatches", "ignored-targets"),
    why="Tokens in microbatches with few targets weigh more than others, and the loss curve depends on the split.",
    mend="Sum the losses and divide by the number of targets of the whole update; do not average averages.",
    source="huggingface/transformers#34191, torchtune#1878, marin-community/levanter#842",
    bound="as ACC-1 (healthy: 1.1e-7; mean of means: 0.27)",
)
def test_ragged_microbatches(runs: Runs) -> None:
    """In every update, microbatches with different numbers of target tokens give the same gradient as one batch: every
    target token weighs the same.
    """
    split = replace(everyday(runs), ignored_targets=True)
    what = f"{split.microbatches} microbatches with different numbers of targets against one batch"
    every_update_agrees(runs, runs.trace(in_one_batch(split)), runs.trace(split), what)


@clause(
    "ACC-3",
    since="0.1",
    needs=("two-ranks",),
    why="Ranks that do not exchange their gradients train different models, on half of the data each.",
    mend="Call the wrapped module, and run both forward and backward of the last microbatch outside no_sync().",
    source="karpathy/build-nanogpt#30, jingyaogong/minimind#853, moojink/openvla-oft#160",
    bound="as ACC-1 (healthy: 5e-8; not exchanged: 0.7); bit equality between the ranks",
)
def test_split_over_ranks(runs: Runs) -> None:
    """Two ranks give the same gradient as one process on all of the sequences, and agree with each other bit for
    bit.
    """
    split = everyday(runs)
    one, (first, second) = runs.trace(split), runs.ranks(on_two_ranks(split))
    for _, update, other in paired(first.updates, second.updates, "rank 1 makes as many updates as rank 0"):
        tensors_equal(dense(update.gradients), dense(other.gradients), "gradients of rank 0 against rank 1")
        tensors_equal(update.after, other.after, "parameters of rank 0 against rank 1")
    gradients_agree(one.update(0).gradients, first.update(0).gradients, "two ranks against one process")


@clause(
    "ACC-4",
    since="0.1",
    needs=("two-ranks", "ignored-targets"),
    why="How much a token weighs depends on the rank that it happens to be on.",
    mend="Divide by the number of targets over all ranks, and undo the average that DDP takes.",
    source="huggingface/transformers#34242, #34373, vllm-project/speculators#942",
    bound="as ACC-1 (healthy: 5e-8, in later updates 1.8e-7, under AdamW 3.5e-6; each rank's own mean: 0.14)",
)
def test_ragged_ranks(runs: Runs) -> None:
    """In every update, two ranks with different numbers of target tokens give the same gradient as one process."""
    whole = in_one_batch(replace(everyday(runs), ignored_targets=True))  # accumulation is ACC-2's
    first, _ = runs.ranks(on_two_ranks(whole))
    what = "two ranks with different numbers of targets against one process"
    every_update_agrees(runs, runs.trace(whole), first, what)


@clause(
    "ACC-5",
    since="0.1",
    why="A gradient that is off by a factor acts as another learning rate and another clipping limit.",
    mend="Divide by the number of predicted tokens of this update: leave out those that are ignored and those with no "
    "next token. "
    "Clear the gradients of all tensors after every update.",
    source="huggingface/transformers#46204 (GPT-2 still: one token too many), #35438 (the number of targets of another "
    "batch), Lightning-AI/litgpt#751",
    bound="5e-3 of the fall of the loss over a small step (healthy: 7e-5, and 1.1e-3 if logits begin with variance 1; "
    "17 tokens counted in place of 16: 5.9e-2)",
)
def test_gradient_of_the_mean(runs: Runs) -> None:
    """The gradient is that of the mean cross entropy over exactly the target tokens, of its own update."""
    plain = small_step(runs)
    ragged = replace(plain, ignored_targets=True)
    recipes = [plain, ragged] if runs.has("ignored-targets") else [plain]
    if runs.has("ignored-targets") and runs.asks("0.2"):  # the update before has another number of targets
        recipes.append(replace(ragged, updates=3, same_batches="but the first"))
    if runs.policy.auxiliary_loss(plain):
        raise NotApplicable("the policy declares that the loss has terms besides the cross entropy")
    for recipe in recipes:
        what = "the gradient, with some targets ignored," if recipe.ignored_targets else "the gradient"
        what += " after an update with another number of targets," if recipe.updates > 2 else ""
        gradient_is_of(*small_steps(recipe, runs.trace(recipe)), what)


def small_steps(
    recipe: Recipe, run: Trace
) -> tuple[tuple[float, float], dict[str, Tensor], tuple[Gradients, Gradients]]:
    """Return the losses, the movement and the gradients of a run whose last two updates train on the same batch."""
    number = recipe.updates - 2
    losses = [loss_of(recipe, run, update) for update in (number, number + 1)]
    first, second = run.update(number), run.update(number + 1)
    moved = Named({name: first.after[name].double() - first.before[name].double() for name in first.before})
    return (losses[0], losses[1]), moved, (first.gradients, second.gradients)


def loss_of(recipe: Recipe, run: Trace, update: int) -> float:
    """Return the mean cross entropy over the targets of an update with one microbatch.

    Raises:
        NotApplicable: if the forwards are not those of the recipe.
    """
    tokens, rows = recipe.batches()[update], recipe.labels()[update]
    found = run.training_forwards(update)
    if len(found) != 1 or sample_numbers(found[0].ids, tokens) != list(range(len(tokens))):
        raise NotApplicable("the forward of an update is not the one asked for: see ACC-6")
    entropies = [entropy for entropy in run.entropies if entropy.grad_enabled and entropy.update == update]
    if stays_inside(found, entropies):
        targets_are_next([entropies[0].labels], [rows])
        return mean_of(entropies)
    return mean_entropy(*next_tokens(found[0].scores, rows))


@clause(
    "ACC-6",
    since="0.1",
    why="A batch of the wrong size trains another model, and experiments cannot be compared.",
    mend="Refuse a number of sequences that cannot be split, or make the last microbatch smaller.",
    source="Lightning-AI/litgpt#1927, litgpt TrainArgs (10 sequences in fours become 8), axolotl#134",
    bound="the sequences themselves; for a total that does not split: their number, or an error",
)
def test_sequences_of_an_update(runs: Runs) -> None:
    """Every update trains on exactly the sequences that belong to it, and the run makes as many updates as asked
    for.
    """
    recipe = everyday(runs)
    run, samples, size = runs.trace(recipe), torch.cat(recipe.batches()), recipe.update_size
    if len(run.updates) != recipe.updates:
        raise Violation(f"{recipe.updates} updates", ": ".join([f"{len(run.updates)} updates", *run.notes[:1]]))
    for update in range(recipe.updates):
        found = run.all_training_forwards(update)
        for evaluation in {f.evaluation for f in found} or {0}:  # of a closure: each on all of them
            seen = [n for f in found if f.evaluation == evaluation for n in sample_numbers(f.ids, samples)]
            if seen == list(range(update * size, (update + 1) * size)):
                continue
            raise Violation(
                f"update {update + 1} trains on its {size} sequences, {update * size} to {(update + 1) * size - 1}",
                f"it trains on {', '.join('an unknown one' if n is None else str(n) for n in seen)}"
                if seen
                else "no forward in training mode and with gradients comes before it",
            )
    if runs.has("batch-total"):
        tried = runs.attempt(Recipe(microbatch_size=4, batch_total=10))
        counts = {sum(len(f.ids) for f in tried.trace.training_forwards(update)) for update in range(2)}
        if tried.error is None and counts != {10}:
            raise Violation(
                "10 sequences per update, as the recipe asks, in microbatches of 4; or an error",
                f"{' and '.join(map(str, sorted(counts)))} sequences per update, and no error",
            )


@clause(
    "ACC-7",
    since="0.1",
    needs=("activation-checkpointing",),
    why="The gradients are computed from activations other than those of the loss, and the loss does not show it.",
    mend="Leave preserve_rng_state on, and make sure nothing else changes between the two forwards.",
    source="allenai/OLMo-core#828 (loss 2.50 in place of 2.20), openai/guided-diffusion#167, pytorch#7617",
    bound="as ACC-1 (healthy: 0; dropout drawn anew: 0.48)",
)
def test_activations_computed_again(runs: Runs) -> None:
    """Activation checkpointing changes no gradient, with dropout if the stack has it."""
    kept = dropping(runs, everyday(runs))
    gradients_agree(
        runs.trace(kept).update(0).gradients,
        runs.trace(replace(kept, activation_checkpointing=True)).update(0).gradients,
        "activations computed again against activations kept",
    )


COARSE_BOUND = 5e-2
"""Of a gradient that is computed in bfloat16, and of another batch size: see ACC-8."""


@clause(
    "ACC-8",
    since="0.2",
    needs=("microbatches",),
    why="A gradient that is right in float32 may still be divided twice, or not at all, where a scaler or another code "
    "path takes over in 16 bits.",
    mend="Scale the loss in one place for all precisions.",
    source="deepspeedai/DeepSpeed#2768, ISEEKYAN/Megatron-LM#149, linkedin/Liger-Kernel#830",
    bound="5e-2 of the gradient vector (healthy: 5e-3; the last microbatch only: 0.87)",
)
def test_split_in_16_bits(runs: Runs) -> None:
    """In every 16-bit precision, accumulating k microbatches gives the same gradient as one batch of the same
    sequences, up to rounding.
    """
    for split in in_16_bits(runs, everyday(runs)):
        gradients_agree(
            runs.trace(in_one_batch(split)).update(0).gradients,
            runs.trace(split).update(0).gradients,
            f"{split.microbatches} microbatches against one batch under {split.precision}",
            COARSE_BOUND,
        )


@clause(
    "ACC-9",
    since="0.2",
    needs=("activation-checkpointing",),
    why="If blocks are recomputed outside autocast, or in another precision, the gradient is that of another forward.",
    mend="Restore autocast and the random state for the second forward, as torch.utils.checkpoint does.",
    source="NVIDIA/Megatron-LM#7538, pytorch#148831, facebookresearch/fairscale#1199",
    bound="as ACC-7 (healthy: 0; recomputed in float32: 3e-3)",
)
def test_activations_computed_again_in_16_bits(runs: Runs) -> None:
    """In every 16-bit precision, activation checkpointing changes no gradient."""
    for kept in in_16_bits(runs, dropping(runs, everyday(runs))):
        gradients_agree(
            runs.trace(kept).update(0).gradients,
            runs.trace(replace(kept, activation_checkpointing=True)).update(0).gradients,
            f"activations computed again against activations kept under {kept.precision}",
        )


@clause(
    "ACC-10",
    since="0.2",
    needs=("microbatches",),
    why="The sequences of a small microbatch weigh more than others at the end of every epoch.",
    mend="Weight each microbatch by its number of targets, or make no smaller ones and declare that in the policy.",
    source="huggingface/transformers#34191, meta-pytorch/torchtune#1878",
    bound="as ACC-1 (healthy: 1.4e-7; every microbatch weighs the same: 0.2)",
)
def test_smaller_microbatch(runs: Runs) -> None:
    """If the last microbatch of an update is smaller than the others, each of its target tokens still weighs the same
    as any other, unless the policy declares something else.
    """
    split = replace(everyday(runs), microbatch_size=2, microbatches=3, updates=2, uneven=True)
    split = replace(split, warmup=0, minimum_lr=None, evaluate=False, evaluate_every=None)
    if runs.policy.leftovers(split, "microbatch") != "weighed":
        raise NotApplicable("the policy declares that a smaller microbatch is not weighed by its tokens")
    try:
        whole = runs.trace(in_one_batch(split))
    except AdapterFailed as error:
        raise NotApplicable(f"the adapter cannot hand over a smaller batch: {error}") from None
    gradients_agree(
        whole.update(0).gradients, runs.trace(split).update(0).gradients, "microbatches of 2, 2 and 1 against one of 5"
    )
