"""RESUME: a run that was interrupted goes on as if it had not been."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from conformance.checks.comparison import states_equal, tensors_equal
from conformance.checks.schedule import rates_of
from conformance.clause import clause
from conformance.errors import NotApplicable, NotWritten, RunFailed, Violation, describe_error
from conformance.recipe import Recipe
from conformance.recording.snapshot import equal_values
from conformance.recording.trace import Checkpoint, Trace, Update
from conformance.runs import Runs
from conformance.suites import (
    by_update,
    interrupted,
    on_two_ranks,
    paired,
    saved,
    shuffled,
    shuffled_on_two_ranks,
)


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
    if len(later) != len(whole.updates) - 2:
        raise Violation(
            f"{len(whole.updates) - 2} more updates, to {len(whole.updates)} in all", f"{len(later)} updates"
        )
    for number, update, other in paired(
        whole.updates[2:], later, "the resumed run against the run that was never interrupted"
    ):
        same_after(update, other, f"parameters after update {number + 2} of the resumed run")


def same_after(one: Update, other: Update, what: str) -> None:
    """Check that an update of a resumed run ends with the parameters of the same one that was not interrupted.

    Args:
        one: the update of the run that was not interrupted.
        other: the same one of the resumed run.
        what: begins the message.

    Raises:
        Violation: with the cause, if it shows, and the tensors that differ.
    """
    try:
        tensors_equal(one.after, other.after, what)
    except Violation as error:
        raise Violation(error.expected, f"{cause_of(one, other)}: {error.seen}") from None


def cause_of(one: Update, other: Update) -> str:
    """Return what the first difference between two updates is, which should be the same."""
    if rates_of(one.groups) != rates_of(other.groups):
        return "another learning rate"
    if any(not equal_values(t, other.before.get(name)) for name, t in one.before.items()):
        return "other parameters before the update already"
    states = [(tuple(s.items()), tuple(other.state_before.get(n, {}).items())) for n, s in one.state_before.items()]
    if not all(equal_values(first, second) for first, second in states):
        return "another state of the optimizer"
    if any(not equal_values(gradient, other.gradients.get(name)) for name, gradient in one.gradients.items()):
        return "another gradient from the same parameters, so other sequences (see RESUME-2) or random numbers"
    return "another step from the same parameters, state and gradient"


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
    for update in (2, 4):  # under shuffled() amid an epoch, and at its end
        goes_on(runs, recipe, samples, update)


NO_UPDATE = (
    "no update: the run ended at once, as one does that goes on from its last checkpoint and not from the one that it "
    "was given"
)


def goes_on(runs: Runs, recipe: Recipe, samples: torch.Tensor, update: int) -> None:
    """Check that a run which is resumed after an update trains on the samples of one that was not interrupted."""
    whole = runs.trace(recipe)
    later = resumed(runs, recipe, whole, update)
    expected, seen = by_update(whole, samples)[update:], by_update(later, samples)
    if expected != seen:
        first = next((i for i, (a, b) in enumerate(zip(expected, seen)) if a != b), min(len(expected), len(seen)))
        raise Violation(
            f"resumed after update {update}, the samples of update {update + first + 1} onwards: "
            f"{expected[first:][:3]}",
            f"{seen[first:][:3] or NO_UPDATE}",
        )


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
    last = whole.update(recipe.updates - 1).after
    tensors_equal(last, later.initial, "parameters of a run that goes on after the last update")


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
    wrapped: dict[str, tuple[Trace, int]] = {}
    if runs.has("compile"):
        wrapped["a compiled run"] = runs.trace(replace(plain, compile=True)), plain.updates
    if runs.has("two-ranks"):
        two = on_two_ranks(plain) if not runs.has("sampler") else shuffled_on_two_ranks()
        wrapped["a run on two ranks"] = runs.ranks(two)[0], two.updates
    if not wrapped:
        raise NotApplicable("lacks both compile and two-ranks")
    for what, (run, updates) in wrapped.items():
        later = resumed(runs, replace(plain, updates=updates + 2), run, updates)
        last = run.update(updates - 1).after
        tensors_equal(last, later.initial, f"parameters of a plain run that resumes from {what}")


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


def same_from(runs: Runs, recipe: Recipe, update: int, what: str) -> None:
    """Check that a run which is resumed after an update has the parameters of one that was not interrupted."""
    whole = runs.trace(recipe)
    later = resumed(runs, recipe, whole, update)
    for number, one, other in paired(whole.updates[update:], later.updates, f"{what}, the resumed run"):
        same_after(one, other, f"{what}: parameters after update {number + update} of the resumed run")


@clause(
    "RESUME-6",
    since="0.2",
    needs=("resume",),
    why="If saving rounds the weights, moves state or uses up random numbers, the result depends on how often the run "
    "saves.",
    mend="Save copies; restore whatever you cast, gather or average for the file.",
    source="huggingface/diffusers#1864 (averages left in place), kohya-ss/sd-scripts#1250",
)
def test_saving_changes_nothing(runs: Runs) -> None:
    """Saving during training changes neither the parameters nor the optimizer's state."""
    recipe = interrupted(runs)
    run, other = runs.trace(recipe), runs.trace(replace(recipe, save_every=None))
    for number, update, plain in paired(run.updates, other.updates, "as many updates without saving as with it"):
        when = f"after update {number}, without saving and with it"
        states_equal(plain.state_after, update.state_after, f"optimizer state {when}")
        tensors_equal(plain.after, update.after, f"parameters {when}")
