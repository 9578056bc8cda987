"""OPT, continued: each step moves the weights as the class of the optimizer says, in every precision and update."""

from conformance.checks import optimizer
from conformance.checks.decay import covered_once, is_class, moved, owned_as_declared
from conformance.checks.embedding import state_bits
from conformance.checks.schedule import rates_are
from conformance.checks.step import Deviation, History, follows_closed_form
from conformance.clause import clause
from conformance.errors import NotApplicable
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Named, Step, Trace, Update
from conformance.runs import Runs
from conformance.suites import (
    ADAMW,
    DECAYING,
    EIGHT_BIT,
    OTHERS,
    REST,
    RMSPROP,
    SGD,
    asked_for,
    beside_muon,
    everyday,
    interrupted,
    rates,
    seen,
    shapes,
    with_muon,
)


def steps_follow(run: Trace) -> None:
    """Check every update of a run against the closed forms of its optimizers.

    Raises:
        Violation: for a step that is another one.
        NotApplicable: if no step of the run could be compared, with the reason.
    """
    history = History()
    for number, update in enumerate(run.updates, start=1):
        for step in update.steps:
            if update.unfounded or step.skipped or step.evaluations > 1:
                raise NotApplicable("an optimizer stepped more than once in an update, or was skipped")
            follows_closed_form(followed(history, update, step), named(step), number)
    if not history.looked:
        reasons = [*dict.fromkeys(history.reasons.values()), "there was no step"]
        raise NotApplicable(f"no step could be compared: {reasons[0]}")


def followed(history: History, update: Update, step: Step) -> dict[str, Deviation]:
    """Return how far each tensor of a step is from its closed form."""
    found = {
        name: history.follow(
            name,
            step.optimizer,
            group.settings,
            update.gradients[name],
            update.before[name],
            update.after[name],
            update.state_before.get(name, {}),
        )
        for group in step.groups
        for name in group.tensors
    }
    return {name: one for name, one in found.items() if one is not None}


def named(step: Step) -> str:
    """Return the name of the class of a step's optimizer."""
    return step.optimizer[0].rpartition(".")[2] if step.optimizer else "its optimizer"


@clause(
    "OPT-14",
    since="0.2",
    why="If anything comes between gradient and weights (another epsilon, a second clipping, coupled decay, a step "
    "that no longer acts), the run trains with an optimizer other than the one it names, and no gradient shows it.",
    mend="Compare the step with the formula in the optimizer's paper, from the first update on.",
    source="pytorch#115607, #191763, joennlae/tensorli#1, DeepSpeed#7641",
    bound="1e-3 of the movement of each tensor, and one rounding of its weights (healthy: 2e-6; weakest mutant, eps of "
    "1e-6 in place of 1e-8: 1e-2)",
)
def test_step_is_the_closed_form(runs: Runs) -> None:
    """In every update, each tensor moves by the closed form (the published formula) of its optimizer, computed from its
    recorded gradients, learning rate and settings.
    """
    recipe = interrupted(runs) if runs.has("resume") else everyday(runs, DECAYING)
    steps_follow(seen(runs.trace(recipe)))


@clause(
    "OPT-15",
    since="0.2",
    needs=("any-optimizer", "keywords"),
    why="A stack that handles only AdamW correctly turns every other optimizer into something that its name does not "
    "say.",
    mend="Pass gradients and settings on to the class that the user named, and leave the step to it.",
    source="pytorch#191763 (SGD), meta-pytorch/torchtune#2152",
    bound="as OPT-14",
)
def test_other_steps_are_closed_forms(runs: Runs) -> None:
    """SGD with momentum, RMSprop, Adam and NAdam receive their settings as the user gave them, and each tensor moves by
    the closed form of that optimizer.
    """
    for choice in OTHERS:
        run = seen(runs.trace(Recipe(updates=6, save_every=3 if runs.has("resume") else None, optimizer=choice)))
        given = {key: value for key, value in choice.arguments if key != "lr"}
        optimizer.keywords_arrive(run.update(0).groups, given, varying=("weight_decay",))
        steps_follow(run)


COARSE = (
    OptimizerChoice.of(SGD, lr=1.0),
    OptimizerChoice.of(SGD, lr=1.0, momentum=0.9),
    OptimizerChoice.of(RMSPROP, lr=1e-2),
    OptimizerChoice.of(ADAMW, lr=1e-2, weight_decay=0.1),
)


@clause(
    "OPT-16",
    since="0.2",
    needs=("any-optimizer", "keywords", "bf16-true"),
    why="Fused SGD of torch 2.12 and 2.13 does not change 16-bit weights on the CPU, and raises no error.",
    mend="Do not ask for a kernel that skips 16-bit weights; compare the weights before and after a step.",
    source="pytorch#191763",
    bound="6e-2 of the movement of each tensor, and one rounding of its weights, where that is below a quarter of the "
    "movement (healthy: 2e-2; skipped: 1)",
)
def test_every_optimizer_trains_16_bit_weights(runs: Runs) -> None:
    """Under bf16-true, every optimizer moves the weights by its closed form, up to the rounding of bfloat16."""
    for choice in COARSE:
        steps_follow(seen(runs.trace(Recipe(precision="bf16-true", updates=4, optimizer=choice))))


@clause(
    "OPT-17",
    since="0.2",
    why="If the step stops acting on a tensor, that tensor's training ends, but the loss still varies with the data "
    "and does not show it.",
    mend="Compare the weights before and after a later step; a compiled or captured step may act on copies of them.",
    source="pytorch#115607 (a compiled optimizer that no longer steps)",
    bound="bit inequality in each of six updates",
)
def test_later_updates_act(runs: Runs) -> None:
    """Every later update moves each tensor that the first update moved, provided that the tensor has a gradient."""
    recipe = everyday(runs)
    run = runs.trace(recipe)
    first = run.update(0)
    start = [name for name in run.trainable if bool((first.before[name] != first.after[name]).any())]
    for number, update in enumerate(run.updates[1:], start=2):
        given = [n for n in start if (gradient := update.gradients.get(n)) is not None and bool(gradient.any())]
        rate = max((float(group.settings.get("lr", 1.0)) for group in update.groups), default=1.0)
        if rate > 0:
            moved(update.before, update.after, given, f"update {number} moves every tensor that update 1 moved")


@clause(
    "OPT-18",
    since="0.2",
    packages=("bitsandbytes",),
    needs=("any-optimizer",),
    why="If the state is 32 bits wide, the run does not save the memory that the 8-bit optimizer was chosen for, and "
    "nothing says so.",
    mend="Pass the optimizer class on unchanged; override the width of its state for embeddings only.",
    source="bitsandbytes 0.50.2 (tensors below 4096 elements keep 32 bits), huggingface/transformers trainer.py",
    bound="dtype of the state, of tensors of 4096 elements and more that belong to no embedding",
)
def test_state_in_8_bits(runs: Runs) -> None:
    """Under an 8-bit optimizer, every large tensor has 8-bit state, unless it belongs to an embedding."""
    for recipe in shapes(runs, Recipe(optimizer=EIGHT_BIT)):
        run = runs.trace(recipe)
        tables = {f"{info.name}.weight" for info in run.embeddings}
        judged = Named({name: info for name, info in run.tensors.items() if not tables.intersection(info.names)})
        state_bits(run.update(-1).state_after, judged, wide=set())


@clause(
    "OPT-19",
    since="0.2",
    needs=("any-optimizer", "keywords"),
    why="A tensor that neither optimizer owns is never trained; one that both own is moved twice.",
    mend="Give Muon the matrices of the blocks, and the other optimizer every trainable tensor that is left.",
    source="KellerJordan/Muon README; modded-nanogpt and nanochat (matrices of blocks to Muon, the rest to AdamW)",
    bound="as OPT-14; Muon: as the rule of its step in conformance.checks.step",
)
def test_muon_beside_another_optimizer(runs: Runs) -> None:
    """If the user names torch.optim.Muon, it trains matrices only, another optimizer trains every other tensor, and
    each tensor moves by the closed form of its own optimizer.
    """
    recipe = with_muon(runs)
    run = beside_muon(runs, recipe)
    owners = {name: runs.policy.owner(recipe, run.tensors[name]) for name in run.trainable}
    for update in run.updates:
        covered_once([group.tensors for group in update.groups], run.trainable)
        owned_as_declared(update.steps, owners)
    steps_follow(run)


@clause(
    "OPT-20",
    since="0.2",
    needs=("any-optimizer", "keywords", "second-optimizer"),
    why="If the second optimizer gets the rate or the keywords of the first, embeddings and norms train at a rate that "
    "is made for matrices.",
    mend="Build each optimizer from its own settings. If your stack builds only one, name second-optimizer in lacks.",
    source="deepspeedai/DeepSpeed#8171, #8440 (the rate of the first is everybody's)",
    bound="as OPT-7",
)
def test_second_optimizer_has_its_own_keywords(runs: Runs) -> None:
    """If the user chooses a second optimizer for the tensors that the first is not for, it gets the learning rate,
    betas and eps that they gave for it.
    """
    recipe = with_muon(runs)
    run = beside_muon(runs, recipe)
    declared = rates(runs, recipe, run)
    if len(set(declared[0].values())) < 2:
        raise NotApplicable("the policy declares the same rate for the tensors of both optimizers")
    rates_are(asked_for(recipe, run), declared, "learning rates of two optimizers,")
    expected = {name: value for name, value in REST.arguments if name in ("betas", "eps")}
    for update in run.updates:
        groups = [
            group for step in update.steps if is_class(REST.class_path, step.optimizer[0]) for group in step.groups
        ]
        optimizer.keywords_arrive(groups, expected)
