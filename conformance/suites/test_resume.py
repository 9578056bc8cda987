"""RESUME: a run that was interrupted goes on as if it had not been."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from conformance.checks.comparison import tensors_equal
from conformance.checks.data import sample_numbers
from conformance.clause import clause
from conformance.errors import NotApplicable, NotWritten, RunFailed, Violation, describe_error
from conformance.recipe import Recipe
from conformance.recording.snapshot import equal_values
from conformance.recording.trace import Checkpoint, Trace
from conformance.runs import Runs
from conformance.suites import interrupted, on_two_ranks, paired, saved, shuffled, shuffled_on_two_ranks


def resumed(runs: Runs, recipe: Recipe, whole: Trace, update: int) -> Trace:
    """Return the run that goes on after an update. Raises Violation if its checkpoint is not there, or not taken up."""
    checkpoint = saved(whole, update)
    try:
        tried = runs.attempt(replace(recipe, resume=checkpoint, save_every=None))
    except RunFailed as error:
        if isinstance(error.__cause__, NotWritten):
            raise Violation(f"a checkpoint after update {update}", str(error.__cause__)) from error
        raise
    if tried.error is not None:
        raise Violation(f"a run that goes on after update {update}", describe_error(tried.error))
    return tried.trace


@clause(
    "RESUME-1",
    since="0.1",
    needs=("resume",),
    why="Moments, schedule or random state start over: the loss goes on smoothly while the weights go elsewhere.",
    mend="Save optimizer, progress and random states, and load them after all of it is built; compare the parameters "
    "of two later updates, since the first loss shows nothing.",
    source="OneVision-Encoder#65, DeepSpeed#7786, huggingface/transformers#17032, nanoGPT#467, fairseq2#1038",
)
def test_goes_on_as_if_never_interrupted(runs: Runs) -> None:
    """After every later update, a resumed run has the same parameters as a run that was never interrupted, bit for
    bit.
    """
    recipe = interrupted(runs)
    whole = runs.trace(recipe)
    later = resumed(runs, recipe, whole, 2).updates
    if len(later) != recipe.updates - 2:
        raise Violation(f"{recipe.updates - 2} more updates, to {recipe.updates} in all", f"{len(later)} updates")
    for number, update, other in paired(
        whole.updates[2:], later, "the resumed run against the run that was never interrupted"
    ):
        tensors_equal(update.after, other.after, f"parameters after update {number + 2} of the resumed run")


@clause(
    "RESUME-2",
    since="0.1",
    needs=("resume",),
    why="Some data is seen twice and some never; the loss on repeated data looks better than it is.",
    mend="Save how much data was consumed, go on there, and begin the next epoch at its beginning.",
    source="KempnerForge#51, Lightning-AI/litgpt#1712, allenai/OLMo#650, verl#7401",
    bound="the sequences themselves, in order",
)
def test_data_goes_on(runs: Runs) -> None:
    """A resumed run goes on with the sequences that come next, even if it crosses the end of an epoch or starts exactly
    there.
    """
    recipe = replace(interrupted(runs), dropout=0.0) if not runs.has("sampler") else shuffled()
    samples = torch.cat(recipe.batches()) if recipe.samples is None else recipe.dataset()
    whole = runs.trace(recipe)
    for update in (2, 4):  # under shuffled() amid an epoch, and at its end
        later = resumed(runs, recipe, whole, update)
        expected, seen = by_update(whole, samples)[update:], by_update(later, samples)
        if expected != seen:
            first = next((i for i, (a, b) in enumerate(zip(expected, seen)) if a != b), min(len(expected), len(seen)))
            raise Violation(
                f"resumed after update {update}, the samples of update {update + first + 1} onwards: "
                f"{expected[first:][:3]}",
                f"{seen[first:][:3] or 'no update'}",
            )


def by_update(run: Trace, samples: torch.Tensor) -> list[list[int | None]]:
    """Return the numbers of the samples that each update trains on."""
    found: list[list[int | None]] = [[] for _ in run.updates]
    for forward in run.training_forwards():
        if forward.update < len(found):
            found[forward.update] += sample_numbers(forward.ids, samples)
    return found


@clause(
    "RESUME-3",
    since="0.1",
    needs=("resume",),
    why="The last updates, those at the lowest learning rate, are lost when the run ends.",
    mend="Save after the last update too, whatever the interval is.",
    source="Lightning-AI/litgpt#1254, KempnerForge#125, anemoi-training#183, nanoGPT (saves at eval_interval only)",
)
def test_last_update_is_saved(runs: Runs) -> None:
    """The stack saves the state after the last update, even if the number of updates is not a multiple of the
    interval.
    """
    recipe = Recipe(updates=3, save_every=2)
    whole = runs.trace(recipe)
    later = resumed(runs, replace(recipe, updates=5), whole, 3)
    tensors_equal(whole.update(-1).after, later.initial, "parameters of a run that goes on after the last update")


@clause(
    "RESUME-4",
    since="0.1",
    needs=("resume",),
    why="Weights saved as _orig_mod. or module. cannot be loaded without the wrapper; a loose load drops them "
    "silently.",
    mend="Save the state of the bare module, or strip the prefixes on saving.",
    source="pytorch#101107, rasbt/LLMs-from-scratch#580, nanoGPT ec9b1f81",
)
def test_taken_up_without_wrappers(runs: Runs) -> None:
    """A plain run resumes from the checkpoint of a compiled run, or of a run on two ranks, with the same weights, bit
    for bit.
    """
    plain = Recipe(save_every=2, updates=2)
    wrapped: dict[str, Trace] = {}
    if runs.has("compile"):
        wrapped["a compiled run"] = runs.trace(replace(plain, compile=True))
    if runs.has("two-ranks"):
        two = on_two_ranks(plain) if not runs.has("sampler") else shuffled_on_two_ranks()
        wrapped["a run on two ranks"] = runs.ranks(two)[0]
    if not wrapped:
        raise NotApplicable("lacks both compile and two-ranks")
    for what, run in wrapped.items():
        later = resumed(runs, replace(plain, updates=len(run.updates) + 2), run, len(run.updates))
        tensors_equal(run.update(-1).after, later.initial, f"parameters of a plain run that resumes from {what}")


@clause(
    "RESUME-5",
    since="0.1",
    needs=("resume",),
    why="A run killed while saving goes on from weights that are partly fresh, and looks like a resumed one.",
    mend="Write under another name and rename when complete; let every read error end the run.",
    source="pytorch-lightning#688, #19970",
    bound="an error before the first update; otherwise bit equality with the run from the whole checkpoint",
)
def test_truncated_checkpoint(runs: Runs) -> None:
    """The stack refuses a checkpoint with a truncated file, unless nothing in the resumed run depends on that file."""
    recipe = Recipe(updates=4, save_every=2)
    checkpoint = saved(runs.trace(recipe), 2)
    whole = resumed(runs, recipe, runs.trace(recipe), 2)  # undamaged, it is taken up
    sizes = {path: path.stat().st_size for path in checkpoint.places() if path.is_file()}
    # Weights and optimizer state are most of it; a truncated log is no damage.
    for damaged in [path for path, size in sizes.items() if size > sum(sizes.values()) / 10]:
        with TemporaryDirectory() as folder:
            copy = truncated(checkpoint, damaged, Path(folder))
            tried = runs.attempt(replace(recipe, resume=copy))
        refused = tried.error is not None and not tried.trace.updates
        if not refused and not goes_on_alike(whole, tried.trace):
            raise Violation(
                "an error before the first update",
                f"{len(tried.trace.updates)} updates from a checkpoint with half of {damaged.name}",
            )


def goes_on_alike(whole: Trace, damaged: Trace) -> bool:
    """Return True if two runs have the same parameters and state throughout: not every copy of a file is read."""
    if len(whole.updates) != len(damaged.updates):
        return False
    return all(
        equal_values(tuple(ours.items()), tuple(theirs.items()))
        for first, second in zip(whole.updates, damaged.updates, strict=True)
        for ours, theirs in (
            (first.before, second.before),
            (first.after, second.after),
            *((state, second.state_after.get(name, {})) for name, state in first.state_after.items()),
        )
    )


def truncated(checkpoint: Checkpoint, damaged: Path, folder: Path) -> Checkpoint:
    """Return a copy of a checkpoint with half of one file."""
    # With the name of the checkpoint's own folder, by which some stacks know how far it is.
    places = [path for path in checkpoint.places() if path.is_file()]
    root = Path(os.path.commonpath([path.parent for path in places])).parent
    copies = []
    for path in places:
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies.append(copy)
        if path == damaged:
            with open(copy, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
    return Checkpoint(checkpoint.update, tuple(copies))
