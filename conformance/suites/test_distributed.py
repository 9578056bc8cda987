"""DIST: two ranks train as one process does, each on its share of the data, and stay equal to each other."""

from dataclasses import replace

import torch

from conformance.checks.accumulation import gradients_agree
from conformance.checks.comparison import states_equal, tensors_equal
from conformance.checks.data import leftovers_as_declared, sample_numbers
from conformance.checks.dropout import masks_differ
from conformance.clause import clause
from conformance.errors import NotApplicable, RunFailed, Violation
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.suites import (
    DECAYING,
    DRIFT,
    by_update,
    everyday,
    interrupted,
    on_two_ranks,
    paired,
    saved,
    sharded,
    shuffled_on_two_ranks,
    unsharded,
)
from conformance.suites.test_data import require_in_epoch
from conformance.suites.test_dropout import repeated
from conformance.suites.test_resume import resumed


@clause(
    "DIST-1",
    since="0.2",
    needs=("two-ranks",),
    why="Replicas that drift apart are two models, and only one of them is evaluated and saved.",
    mend="Reduce every gradient; clip by the same norm and step with the same settings on all ranks; broadcast random "
    "values that all ranks must share.",
    source="deepspeedai/DeepSpeed#1801 (clipped on one rank), pytorch#104336 (hooks lost after a conversion)",
)
def test_replicas_stay_equal(runs: Runs) -> None:
    """After every update, both ranks have the same parameters and the same optimizer state, bit for bit, with dropout
    and weight decay on.
    """
    recipe = interrupted(runs) if runs.has("resume") else everyday(runs, DECAYING)
    first, second = runs.ranks(on_two_ranks(recipe))
    for number, one, other in paired(first.updates, second.updates, "rank 1 makes as many updates as rank 0"):
        tensors_equal(one.after, other.after, f"parameters after update {number}, rank 0 against rank 1")
        states_equal(
            one.state_after, other.state_after, f"optimizer state after update {number}, rank 0 against rank 1"
        )


@clause(
    "DIST-2",
    since="0.2",
    needs=("two-ranks",),
    why="A loop that is right only in its first update trains another model from the second on.",
    mend="Compare the gradients of a later update with those of one process, tensor by tensor.",
    source="pytorch#104336, TTrace (arXiv:2506.09280), Lightning-AI/litgpt 9892d1b8",
    bound="1e-3 of the gradient vector (healthy: 2e-6; weakest mutant, not exchanged from the second update on: 0.7)",
)
def test_later_updates_of_two_ranks(runs: Runs) -> None:
    """In every update, two ranks have the same gradient as one process on all of the sequences, up to rounding."""
    split = everyday(runs)
    one, (first, _) = runs.trace(split), runs.ranks(on_two_ranks(split))
    for number, update, other in paired(one.updates, first.updates, "two ranks make as many updates as one process"):
        gradients_agree(
            update.gradients, other.gradients, f"update {number}, two ranks against one process", bound=DRIFT
        )


@clause(
    "DIST-3",
    since="0.2",
    needs=("two-ranks",),
    why="A rank that trains on another rank's data wastes its share, and some sequences are never seen.",
    mend="Give each rank its own part of every update, and let no rank take data ahead of the others.",
    source="TinyLlama#67, #69, NVlabs/LongLive#71, openspeech#149",
    bound="the sequences themselves",
)
def test_ranks_split_each_update(runs: Runs) -> None:
    """In every update, each rank trains on its own share of the sequences, and together the ranks train on all
    sequences of the update.
    """
    recipe = on_two_ranks(everyday(runs))
    rows = torch.cat([torch.cat(recipe.batches(rank)) for rank in range(2)])
    first, second = (by_update(run, rows) for run in runs.ranks(recipe))
    if len(first) != recipe.updates or len(second) != recipe.updates:
        raise Violation(f"{recipe.updates} updates on each rank", f"{len(first)} on rank 0 and {len(second)} on rank 1")
    share = len(rows) // 2 // recipe.updates
    for update in range(recipe.updates):
        own = list(range(update * share, (update + 1) * share))
        wanted = [own, [number + recipe.updates * share for number in own]]
        if [first[update], second[update]] != wanted:
            raise Violation(
                f"in update {update + 1} sequences {wanted[0]} on rank 0 and {wanted[1]} on rank 1",
                f"{first[update]} on rank 0 and {second[update]} on rank 1",
            )


@clause(
    "DIST-4",
    since="0.2",
    level="should",
    needs=("two-ranks", "dropout"),
    why="Ranks that share their dropout masks use each mask for several parts of the batch, and the gradient is "
    "noisier.",
    mend="Seed the random state of each rank from the seed and the rank, after the model is built.",
    source="mlcommons/training#844",
    bound="different bits",
)
def test_another_mask_on_each_rank(runs: Runs) -> None:
    """In training, dropout draws a different mask on each rank."""
    recipe = replace(repeated(runs, 0.5), world_size=2)
    first, second = (run.training_forwards(0) for run in runs.ranks(recipe))
    row = recipe.batches()[0]
    for one, other in zip(first, second, strict=True):
        if None in sample_numbers(torch.cat((one.ids, other.ids)), row):
            raise NotApplicable("the stack does not train on the sequence that the recipe gives: see ACC-6")
        masks_differ(one.scores[0], other.scores[0], "each rank")


@clause(
    "DIST-5",
    since="0.2",
    needs=("two-ranks", "resume"),
    why="A run that moves to a smaller machine starts with moments of zero, and only later weights show it.",
    mend="Gather the whole state before saving, and save it under the names that a run in one process uses.",
    source="DeepSpeed#7786, pytorch#101107; torch.distributed.checkpoint",
)
def test_one_process_takes_up_two_ranks(runs: Runs) -> None:
    """One process resumes from a checkpoint of two ranks with the same parameters and optimizer state, bit for bit."""
    plain = Recipe(save_every=2, updates=2)
    two = shuffled_on_two_ranks() if runs.has("sampler") else on_two_ranks(plain)
    run = runs.ranks(two)[0]
    later = resumed(runs, replace(plain, updates=len(run.updates) + 2), run, len(run.updates))
    what = "at the start of one process that goes on from two ranks"
    tensors_equal(run.update(-1).after, later.initial, f"parameters {what}")
    states_equal(run.update(-1).state_after, later.update(0).state_before, f"optimizer state {what}")


@clause(
    "DIST-6",
    since="0.2",
    needs=("two-ranks", "resume"),
    why="If a checkpoint reaches one rank only, the others go on from fresh weights or moments.",
    mend="Load weights and state on every rank, or broadcast them from the rank that has loaded them.",
    source="pytorch#104336; DDP broadcasts when it wraps, not when a checkpoint is loaded later",
)
def test_two_ranks_take_up_one_process(runs: Runs) -> None:
    """Two ranks resume from a checkpoint of one process, each with the same parameters and optimizer state, bit for
    bit.
    """
    recipe = Recipe(updates=4, save_every=2)
    whole = runs.trace(recipe)
    two = on_two_ranks(replace(recipe, resume=saved(whole, 2), save_every=None))
    try:
        ranks = runs.ranks(two)
    except RunFailed as error:
        raise Violation("two ranks that go on after update 2 of one process", str(error)) from error
    for run in ranks:
        what = f"at the start of rank {run.rank}, which goes on from one process"
        tensors_equal(whole.update(1).after, run.initial, f"parameters {what}")
        states_equal(whole.update(1).state_after, run.update(0).state_before, f"optimizer state {what}")


@clause(
    "DIST-7",
    since="0.2",
    needs=("two-ranks", "sampler"),
    why="If ranks and batches do not divide an epoch evenly, samplers repeat or lose samples in every epoch.",
    mend="Decide what happens to the samples that are left over, and declare it.",
    source="huggingface/accelerate#2316, torch.utils.data.DistributedSampler (repeats)",
    bound="number of times that each sample is seen",
)
def test_samples_left_over_on_two_ranks(runs: Runs) -> None:
    """On two ranks, the stack treats the samples that are left over at the end of an epoch as the policy declares."""
    recipe = Recipe(samples=7, microbatch_size=2, updates=7, world_size=2)
    word = runs.policy.leftovers(recipe, "ranks")
    require_in_epoch(word)
    assert recipe.samples is not None
    first, second = (by_update(run, recipe.dataset()) for run in runs.ranks(recipe))
    updates = [[*one, *other] for one, other in zip(first, second, strict=True)]
    leftovers_as_declared(updates, recipe.samples, 4, word, "samples, over both ranks,")


@clause(
    "DIST-8",
    since="0.2",
    needs=("two-ranks", "sharded"),
    why="If each rank draws its own part, or the random state differs, a sharded run starts from weights that no seed "
    "names, and no run on one device repeats it.",
    mend="Draw every tensor whole from the same seed on all ranks, and keep this rank's part of it.",
    source="Lightning-AI/litgpt#269; fully_shard keeps each rank's own part of what that rank drew",
)
def test_sharded_start(runs: Runs) -> None:
    """A run that splits its parameters over two ranks starts from the same parameters as one process, bit for bit."""
    recipe = unsharded(runs)
    one = runs.trace(recipe)
    for run in runs.ranks(sharded(recipe)):
        tensors_equal(one.initial, run.initial, f"parameters at the start, one process against sharded rank {run.rank}")


@clause(
    "DIST-9",
    since="0.2",
    needs=("two-ranks", "sharded"),
    why="A sum where a mean is due, or a norm over one rank's part only, is another learning rate or another clipping.",
    mend="Average the gradients over the ranks, and clip by the norm over all parts of all tensors.",
    source="pytorch#72548, #88955, torchtitan#766 (a norm over this rank's part); burn#5695 (summed)",
    bound="1e-3 of the gradient vector, and of the movement (healthy: 1e-6; weakest mutant, clipped by each rank's own "
    "norm: 0.3)",
)
def test_sharded_updates(runs: Runs) -> None:
    """In every update, a run that splits its parameters over two ranks has the same gradient as one process on all of
    the sequences, and moves the parameters alike, up to rounding, with and without clipping.
    """
    recipe = unsharded(runs)  # clipped gradients alone would not show a sum where a mean is due
    limits = (0.5, 1000.0) if runs.has("clip") else ()  # below the norm, and so far above that nothing is clipped
    for each in [recipe, *(replace(recipe, clip=limit, save_every=None) for limit in limits)]:
        one = runs.trace(each)
        for run in runs.ranks(sharded(each)):
            before, other_before = one.initial, run.initial
            what = "a sharded run makes as many updates as one process"
            for number, update, other in paired(one.updates, run.updates, what):
                where = f"update {number}, clip {each.clip}, one process against sharded rank {run.rank}"
                gradients_agree(update.gradients, other.gradients, f"the gradient of {where}", bound=DRIFT)
                moves = {name: after - before[name] for name, after in update.after.items()}
                others = {name: after - other_before[name] for name, after in other.after.items()}
                gradients_agree(moves, others, f"the movement of {where}", bound=DRIFT)
                before, other_before = update.after, other.after


@clause(
    "DIST-10",
    since="0.2",
    needs=("two-ranks", "sharded", "resume"),
    why="A checkpoint that holds one rank's part, or parts in another order, goes on from other weights or moments.",
    mend="Gather each tensor whole before saving (torch.distributed.checkpoint's full_state_dict does).",
    source="pytorch#101107; torch.distributed.checkpoint (full_state_dict)",
)
def test_one_process_takes_up_a_sharded_run(runs: Runs) -> None:
    """One process resumes from a checkpoint of a run that split its parameters over two ranks, with the same parameters
    and optimizer state, bit for bit.
    """
    recipe = unsharded(runs)
    run = runs.ranks(sharded(recipe))[0]
    later = resumed(runs, replace(recipe, updates=recipe.updates + 1), run, recipe.updates)
    what = "at the start of one process that goes on from a sharded run"
    tensors_equal(run.update(-1).after, later.initial, f"parameters {what}")
    states_equal(run.update(-1).state_after, later.update(0).state_before, f"optimizer state {what}")


@clause(
    "DIST-11",
    since="0.2",
    needs=("two-ranks", "sharded", "resume"),
    why="A rank that takes another rank's part goes on from moments that belong to other weights; no error shows it.",
    mend="Split each tensor of the checkpoint as the parameter itself is split.",
    source="pytorch#101107; torch.distributed.checkpoint (set_optimizer_state_dict)",
)
def test_a_sharded_run_takes_up_one_process(runs: Runs) -> None:
    """A run that splits its parameters over two ranks resumes from a checkpoint of one process, with the same
    parameters and optimizer state, bit for bit.
    """
    recipe = unsharded(runs)
    whole = runs.trace(recipe)
    more = replace(recipe, updates=recipe.updates + 1, resume=saved(whole, recipe.updates), save_every=None)
    for run in runs.ranks(sharded(more)):
        what = f"at the start of sharded rank {run.rank}, which goes on from one process"
        tensors_equal(whole.update(-1).after, run.initial, f"parameters {what}")
        states_equal(whole.update(-1).state_after, run.update(0).state_before, f"optimizer state {what}")


@clause(
    "DIST-12",
    since="0.2",
    needs=("two-ranks", "resume"),
    why="If a resumed run divides the data by another rule, both ranks train on the same sequences from then on, and "
    "the others are never seen.",
    mend="Give each rank its rank and the number of ranks again when the data goes on.",
    source="TinyLlama#69, wyim-pgl/transgenic#59 (a resumed loader skips the wrong samples)",
    bound="the sequences themselves, in order; bit equality of the parameters",
)
def test_two_ranks_go_on(runs: Runs) -> None:
    """Two ranks that are resumed go on with the sequences that come next on each of them, and have the same parameters
    as two ranks that were never interrupted, bit for bit.
    """
    recipe = shuffled_on_two_ranks() if runs.has("sampler") else on_two_ranks(interrupted(runs))
    rows = recipe.dataset() if recipe.samples else torch.cat([torch.cat(recipe.batches(rank)) for rank in range(2)])
    whole = runs.ranks(recipe)
    try:
        later = runs.ranks(replace(recipe, resume=saved(whole[0], 2), save_every=None))
    except RunFailed as error:
        raise Violation("two ranks that go on after update 2 of two ranks", str(error)) from error
    for one, other in zip(whole, later, strict=True):
        expected, found = by_update(one, rows)[2:], by_update(other, rows)
        if expected != found:
            raise Violation(f"after the resume rank {one.rank} goes on with samples {expected}", f"it takes {found}")
    for one, other in zip(whole, later, strict=True):
        what = f"rank {one.rank} resumed against rank {one.rank} not interrupted"
        for number, update, resumed_one in paired(one.updates[2:], other.updates, what):
            tensors_equal(update.after, resumed_one.after, f"parameters after update {number + 2}, {what}")
