"""RESUME, continued: with other settings, frozen parts, precisions and optimizers, in a later epoch, and twice."""

from dataclasses import replace

from torch import Tensor

from conformance.checks.comparison import tensors_equal
from conformance.checks.schedule import rates_are
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, describe_error, quoted
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.snapshot import equal_values
from conformance.recording.trace import Named
from conformance.runs import Runs
from conformance.suites import (
    ADAMW,
    DECAYING,
    OTHERS,
    beside_muon,
    interrupted,
    odd_epochs,
    paired,
    rates,
    saved,
    with_muon,
)
from conformance.suites.test_resume import goes_on, resumed, same_after, same_from

OTHER = OptimizerChoice.of(ADAMW, lr=3e-3, weight_decay=0.03)


@clause(
    "RESUME-7",
    since="0.2",
    needs=("resume", "keywords"),
    why="A user who resumes with a smaller rate or another decay may train with the old values, or with the new ones "
    "where the old ones were expected.",
    mend="Decide whether the saved or the new values win, apply them from the first update on, and declare it; "
    "load_state_dict() restores the saved ones.",
    source="pytorch.org/docs: Optimizer.load_state_dict replaces the settings of the groups",
    bound="as LR-1 for the rate; equality for weight_decay",
)
def test_other_settings(runs: Runs) -> None:
    """A run that is resumed with another learning rate and weight decay uses the values that the policy declares, from
    its first update on.
    """
    old = Recipe(updates=4, save_every=2, optimizer=DECAYING)
    new = replace(old, optimizer=OTHER)
    winner = {setting: runs.policy.wins_on_resume(new, setting) for setting in ("lr", "weight_decay")}
    run = resumed(runs, new, runs.trace(old), 2)
    declared = rates(runs, new if winner["lr"] == "recipe" else old, run)[2:]
    rates_are([update.groups for update in run.updates], declared, f"of the resumed run, the {winner['lr']}'s rates")
    choice = (new if winner["weight_decay"] == "recipe" else old).optimizer
    wanted = dict(choice.arguments)["weight_decay"]
    found = {group.settings.get("weight_decay") for update in run.updates for group in update.groups} - {0}
    if found - {wanted}:
        raise Violation(f"the {winner['weight_decay']}'s weight_decay, {wanted}", f"it is {quoted(found)}")


@clause(
    "RESUME-8",
    since="0.2",
    needs=("resume", "foreign-module", "seed"),
    why="Frozen tensors that the checkpoint leaves out are drawn again at the resume, with other values.",
    mend="Save every tensor, trained or frozen.",
    source="deepspeedai/DeepSpeed#6771, #5489, litgpt save_lora_checkpoint",
)
def test_frozen_parts_are_saved(runs: Runs) -> None:
    """A run that is resumed under another seed starts from all of the saved parameters, including frozen ones."""
    recipe = Recipe(module="conformance.probes:MemoryTransformer", optimizer=DECAYING, updates=4, save_every=2)
    whole = runs.trace(recipe)
    later = runs.start(replace(recipe, resume=saved(whole, 2), seed=2))
    tensors_equal(whole.update(1).after, later.initial, "parameters, frozen ones too, at the start of the resumed run")


@clause(
    "RESUME-9",
    since="0.2",
    needs=("resume", "sampler"),
    why="The position in the data is off by the samples that were left over in each earlier epoch.",
    mend="Count samples, not batches, or save the epoch and the position; go on in the order of that epoch.",
    source="Lightning-AI/litgpt#1712, allenai/OLMo#650, huggingface/accelerate#2316",
    bound="the sequences themselves, in order",
)
def test_resumed_in_a_later_epoch(runs: Runs) -> None:
    """A run that is resumed in the middle of a later epoch goes on with the sequences that come next, even if batches
    do not divide the epoch evenly.
    """
    recipe = odd_epochs()
    goes_on(runs, recipe, recipe.dataset(), 5)


@clause(
    "RESUME-10",
    since="0.2",
    needs=("resume", "bf16-true"),
    why="A tensor that is saved in another dtype than it is trained in is rounded on the way.",
    mend="Save weights and optimizer state in their own dtypes, and load them into the same dtypes.",
    source="TensorAuto/OpenTau#185, huggingface/nanotron#245",
)
def test_resume_in_16_bits(runs: Runs) -> None:
    """Under bf16-true, a resumed run has the same parameters as a run that was never interrupted, bit for bit."""
    recipe = Recipe(precision="bf16-true", optimizer=DECAYING, updates=4, save_every=2)
    same_from(runs, recipe, 2, "under bf16-true")


@clause(
    "RESUME-11",
    since="0.2",
    needs=("resume", "any-optimizer", "keywords"),
    why="A stack that knows only the names of AdamW's state loses that of other optimizers, or rounds it where the "
    "weights have 16 bits.",
    mend="Save the whole optimizer.state_dict(); restore scalars that load_state_dict() casts to the dtype of the "
    "weights.",
    source="OneVision-Encoder#65; torch's load_state_dict rounds NAdam's mu_product under bf16-true",
)
def test_resume_with_other_optimizers(runs: Runs) -> None:
    """Under SGD with momentum, RMSprop, Adam and NAdam, a resumed run has the same parameters as a run that was never
    interrupted, bit for bit.
    """
    for choice in OTHERS:
        name = choice.class_path.rpartition(".")[2]
        same_from(runs, Recipe(updates=6, save_every=3, optimizer=choice), 3, f"with {name}")
        if name == "NAdam" and runs.has("bf16-true"):
            coarse = Recipe(updates=4, save_every=2, optimizer=choice, precision="bf16-true")
            same_from(runs, coarse, 2, f"with {name} under bf16-true")


@clause(
    "RESUME-12",
    since="0.2",
    needs=("resume", "any-optimizer", "keywords"),
    why="A checkpoint that holds the state of one optimizer starts the others afresh, and the loss does not show it.",
    mend="Save and load the state of every optimizer, and name each in the checkpoint.",
    source="KellerJordan/modded-nanogpt (a list of optimizers); the state of each is a state_dict of its own",
)
def test_resume_with_two_optimizers(runs: Runs) -> None:
    """Under Muon beside another optimizer, a resumed run has the same parameters as a run that was never interrupted,
    bit for bit.
    """
    recipe = with_muon(runs)
    beside_muon(runs, recipe)
    same_from(runs, recipe, 2, "with Muon beside another optimizer")
    if runs.has("bf16-true"):
        same_from(runs, replace(recipe, precision="bf16-true"), 2, "with Muon beside another optimizer under bf16-true")


@clause(
    "RESUME-13",
    since="0.2",
    needs=("resume",),
    why="Long runs are interrupted more than once. A stack that counts from its own start saves a wrong number "
    "of updates in the checkpoints of a resumed run, and only a second resume shows it.",
    mend="Count updates from the start of the first run, and save that number.",
    source="pytorch/torchtitan#571 (wrong step when resuming for the second time)",
)
def test_resumed_twice(runs: Runs) -> None:
    """A run that is resumed from the checkpoint of a resumed run makes the updates that are left, and has the same
    parameters as a run that was never interrupted, bit for bit.
    """
    recipe = interrupted(runs)
    whole = runs.trace(recipe)
    second = runs.attempt(replace(recipe, resume=saved(whole, 2)))
    try:
        for _, one, other in paired(whole.updates[2:], second.trace.updates, "the run resumed once"):
            same_after(one, other, "the run resumed once")
    except Violation:
        raise NotApplicable("a run that is resumed once already goes on otherwise: see RESUME-1") from None
    # A trace counts its own updates, but a checkpoint of a resumed run is that of update 4 to its stack.
    checkpoint = replace(saved(second.trace, 2), update=4)
    tried = runs.attempt(replace(recipe, resume=checkpoint, save_every=None))
    if tried.error is not None:
        raise Violation("a run that goes on after the second resume, at update 4", describe_error(tried.error))
    left = len(whole.updates) - 4
    if len(tried.trace.updates) != left:
        raise Violation(f"{left} updates after the second resume, at update 4", f"{len(tried.trace.updates)} updates")
    for number, one, other in paired(whole.updates[4:], tried.trace.updates, "the run resumed twice"):
        same_after(one, other, f"parameters after update {number + 4} of the run resumed twice")


def several() -> Recipe:
    """Return a run that writes four checkpoints, of which the last has the first two-digit number, and keeps two."""
    return Recipe(updates=WRITTEN[-1], save_every=WRITTEN[0], keep_last=2)


WRITTEN = [3, 6, 9, 12]
"""The updates after which several() saves."""


@clause(
    "RESUME-14",
    since="0.2",
    needs=("keep-last",),
    why="If the wrong checkpoints are removed, the run resumes from old weights, or from none.",
    mend="Sort checkpoints by their number of updates, not by name, and remove from the front. If your stack keeps "
    "all, name keep-last in lacks.",
    source="huggingface/transformers#11769, #27138",
    bound="the files themselves",
)
def test_newest_checkpoints_stay(runs: Runs) -> None:
    """If the stack keeps only the newest checkpoints, those stay, and it removes the oldest, whatever the numbers of
    digits.
    """
    recipe = several()
    run = runs.trace(recipe)
    left = []
    for update in WRITTEN:
        checkpoint = run.checkpoint(update)
        if checkpoint is not None:
            _, largest = max(
                (size, path) for path, (_, _, size) in zip(checkpoint.files, checkpoint.copies, strict=True)
            )
            left += [update] if largest.exists() else []
    if left == WRITTEN:
        raise NotApplicable("the run keeps all of its checkpoints, or the adapter does not read Recipe.keep_last")
    if WRITTEN[0] in left or not set(WRITTEN[-2:]) <= set(left):
        raise Violation(
            f"of the checkpoints of updates {quoted(WRITTEN)}, the newest two and not the first",
            f"the checkpoints of updates {quoted(left)}" if left else "no checkpoint",
        )


@clause(
    "RESUME-15",
    since="0.2",
    needs=("resume", "finds-newest"),
    why="A run that is started again goes on from an old checkpoint, and does days of work a second time.",
    mend="Compare numbers of updates as numbers: as text, 9 is later than 10.",
    source="allenai/open-instruct#541, Lightning-AI/litgpt#661 (9 is taken for later than 10)",
)
def test_newest_checkpoint_is_found(runs: Runs) -> None:
    """If the stack is to find the newest checkpoint of a directory by itself, it goes on from the one after the most
    updates, with the parameters of that one, bit for bit.
    """
    recipe = several() if runs.has("keep-last") else replace(several(), keep_last=None)
    whole = runs.trace(recipe)
    newest = whole.checkpoint(recipe.updates)
    if newest is None or not all(path.exists() for path in newest.files):
        raise NotApplicable("the checkpoint of the last update is not there: see RESUME-3 and RESUME-14")
    more = replace(recipe, updates=recipe.updates + 2, save_every=None, keep_last=None, resume=newest, find_newest=True)
    tried = runs.attempt(more)
    runs.require_read(more, "find_newest", "finds-newest")
    if tried.error is not None:
        raise Violation(f"a run that goes on after update {recipe.updates}", describe_error(tried.error))
    for update in WRITTEN[:-1]:
        if same_tensors(whole.update(update - 1).after, tried.trace.initial):
            raise Violation(
                f"of the checkpoints of updates {quoted(WRITTEN)}, the run goes on from the newest",
                f"it goes on from that of update {update}",
            )
    tensors_equal(
        whole.update(-1).after, tried.trace.initial, "parameters of a run that goes on from the newest checkpoint"
    )


def same_tensors(one: Named[Tensor], other: Named[Tensor]) -> bool:
    """Return whether two runs have the same parameters, bit for bit."""
    return equal_values(tuple(one.items()), tuple(other.items()))
