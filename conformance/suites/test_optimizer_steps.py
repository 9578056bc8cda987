"""OPT, continued: each step moves the weights as the class of the optimizer says, in every precision and update."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from conformance.checks import optimizer
from conformance.checks.accumulation import gradients_agree
from conformance.checks.decay import covered_once, is_class, moved, owned_as_declared
from conformance.checks.embedding import state_bits
from conformance.checks.schedule import rates_are
from conformance.checks.step import Deviation, History, follows_closed_form
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Named, Step, Trace, Update
from conformance.runs import Runs
from conformance.suites import (
    ADAMW,
    DECAYING,
    EIGHT_BIT,
    MUON,
    OTHERS,
    REST,
    RMSPROP,
    SGD,
    STILL,
    asked_for,
    beside_muon,
    each_unless_refused,
    every_day,
    everyday,
    interrupted,
    on_two_ranks,
    rates,
    require_still,
    seen,
    setting,
    shapes,
    tied,
    with_muon,
)
from conformance.suites.test_embedding_finetuning import starts as tunings
from conformance.suites.test_embedding_finetuning import tuned


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
    bound="1e-3 of the movement of each tensor, and one rounding of its weights (healthy: 2e-6; eps of 1e-6 in place "
    "of 1e-8: 1e-2; weakest mutant, moments rounded to bfloat16: 1.5e-3 in the second update)",
)
def test_step_is_the_closed_form(runs: Runs) -> None:
    """In every update, each tensor moves by the closed form (the published formula) of its optimizer, computed from its
    recorded gradients, learning rate and settings: in 32 and in 16 bits, with tied weights, on two ranks, and in
    fine-tuning.
    """
    steps_follow(seen(runs.trace(with_decay(runs))))
    for where, run in other_runs(runs) if runs.asks("0.2") else ():
        try:
            with contextlib.suppress(NotApplicable):  # the plain run was judged
                steps_follow(seen(run))
        except Violation as error:
            raise Violation(f"{where}: {error.expected}", error.seen) from None


def with_decay(runs: Runs) -> Recipe:
    """Return the everyday run with AdamW and weight decay, as clauses about checkpoints and ranks share it."""
    return interrupted(runs) if runs.has("resume") else everyday(runs, DECAYING)


def other_runs(runs: Runs) -> Iterator[tuple[str, Trace]]:
    """Yield such a run in bfloat16, with tied weights, on two ranks and in fine-tuning, where the subject can; and what
    it is, for messages. On two ranks it is that of rank 0: DIST-1 compares both.
    """
    short = replace(with_decay(runs), save_every=None, evaluate=False, evaluate_every=None)
    coarse = [replace(short, precision=name) for name in runs.precisions() if name == "bf16-mixed"]
    for recipe in [*coarse, *tied(runs, short)]:
        with contextlib.suppress(NotApplicable):
            yield setting(recipe).removesuffix(": "), runs.trace(recipe)
    if runs.has("two-ranks"):
        with contextlib.suppress(NotApplicable):
            yield "two ranks", runs.ranks(on_two_ranks(with_decay(runs)))[0]
    for recipe in tunings(runs)[:1] if runs.has("finetune") else ():
        with contextlib.suppress(NotApplicable):
            yield "fine-tuning", tuned(runs, recipe)


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
        for update in run.updates:
            optimizer.keywords_arrive(update.groups, given, varying=("weight_decay",))
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
    bound="bit inequality in each of six updates; no gradient other than 0 in the last two updates or more",
)
def test_later_updates_act(runs: Runs) -> None:
    """Every later update moves each tensor that the first update moved, provided that the tensor has a gradient, and
    none of these tensors is left without a gradient for good.
    """
    later_updates_act(runs.trace(everyday(runs)))
    if runs.asks("0.2"):
        keep = [recipe for recipe in every_day(runs) if recipe.precision != "bf16-true"]  # whose small updates are lost
        each_unless_refused(keep, lambda recipe: later_updates_act(runs.trace(recipe), setting(recipe)))


def largest_move(update: Update, names: list[str]) -> float:
    """Return how far an update moves one of the elements of these tensors at most."""
    return max((float((update.after[n] - update.before[n]).abs().max()) for n in names), default=0.0)


def rounding(tensor: Tensor) -> float:
    """Return twice the step between numbers of the size of a tensor's largest element."""
    return 2 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())


def later_updates_act(run: Trace, where: str = "") -> None:
    """Check that every later update acts on what the first update has moved."""
    first = run.update(0)
    largest = largest_move(first, list(run.trainable))
    start = [name for name in run.trainable if bool((first.before[name] != first.after[name]).any())]
    for number, update in enumerate(run.updates[1:], start=2):
        given = [n for n in start if (gradient := update.gradients.get(n)) is not None and bool(gradient.any())]
        # Where all moves shrink, as LBFGS's do, the smallest are lost to rounding.
        share = (largest_move(update, list(run.trainable)) or largest) / max(largest, 1e-30)
        given = [n for n in given if largest_move(first, [n]) * share > rounding(update.before[n])]
        rate = max((float(group.settings.get("lr", 1.0)) for group in update.groups), default=1.0)
        if rate > 0:
            moved(update.before, update.after, given, f"{where}update {number} moves every tensor that update 1 moved")
    gradients = [{name: update.gradients.get(name) for name in start} for update in run.updates]
    try:
        optimizer.keeps_learning(gradients)
    except Violation as error:
        raise Violation(f"{where}{error.expected}", error.seen) from None


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
    optimizer.keeps_learning([update.gradients for update in run.updates])


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


@clause(
    "OPT-21",
    since="0.2",
    why="If something besides the optimizer moves the weights (a second step, a decay by hand, a rounding), the "
    "optimizer's state no longer fits them, and no gradient shows it.",
    mend="Change weights in the optimizer's step only; evaluate and save copies.",
    source="paiml/entrenar#314 (a tied table that is stepped twice), ultralytics/ultralytics#21283 (a validation that "
    "halves the weights), PaddlePaddle/Paddle#5836 (a decay beside the optimizer's)",
    bound="bit equality; at a rate that moves nothing, 1e-6 of each tensor (healthy: 0; weakest mutant: 1e-4)",
)
def test_nothing_else_moves_the_weights(runs: Runs) -> None:
    """Nothing but optimizers moves the weights: from the second update on, they stay where they are if the learning
    rate is too small to move any; and in 16 bits, with tied weights, on two ranks and in fine-tuning, no weight moves
    between updates that does not in a plain run.
    """
    still = replace(everyday(runs).optimizer, arguments=(("lr", STILL),))
    resting = runs.trace(replace(everyday(runs), optimizer=still, updates=4, minimum_lr=None, warmup=0))
    require_still(resting)
    optimizer.stays(resting.updates[1:])
    usual = runs.trace(everyday(runs))
    for recipe in every_day(runs)[1:]:
        with contextlib.suppress(NotApplicable):  # refused
            moves_as_usual(usual, runs.trace(recipe), setting(recipe).removesuffix(": "))
    if not optimizer.changed_between(usual.updates):  # adapters have no name in a plain run
        for where, run in other_runs(runs):
            moves_as_usual(usual, run, where)


def moves_as_usual(usual: Trace, run: Trace, where: str) -> None:
    """Check that between updates nothing moves in a run that stays in the plain one, by any name of a tensor."""
    names = {name: info.names for name, info in run.tensors.items()}
    optimizer.moves_no_more_than(usual.updates, run.updates, names, where)


@clause(
    "OPT-22",
    since="0.2",
    needs=("any-optimizer", "keywords"),
    why="If the gradients of one of two optimizers are never cleared, they add up over the run, and only the tensors "
    "of that optimizer show it.",
    mend="Clear the gradients of every optimizer after each update.",
    source="torch/cunn#212 (some gradients are not zeroed, and add up over the updates)",
    bound="1e-5 of the gradient vector (healthy: 0; added up: 1)",
)
def test_both_optimizers_start_from_no_gradient(runs: Runs) -> None:
    """With two optimizers that move nothing, two updates on the same sequences have the same gradient, in the tensors
    of either optimizer.
    """
    rest = OptimizerChoice.of(ADAMW, lr=STILL, weight_decay=0.0) if runs.has("second-optimizer") else None
    recipe = Recipe(optimizer=OptimizerChoice.of(MUON.class_path, lr=STILL, weight_decay=0.0), rest=rest)
    run = beside_muon(runs, replace(recipe, same_batches=True))
    gradients_agree(
        run.update(0).gradients, run.update(1).gradients, "the gradient of update 2 against that of update 1"
    )


@clause(
    "OPT-23",
    since="0.2",
    needs=("keywords", "builds-optimizer", "finetune"),
    why="Fine-tuning with other settings than those in its configuration cannot be repeated, and nothing shows it.",
    mend="Build the optimizer of a fine-tuning from the user's keywords, as that of any other run.",
    source="NVIDIA-NeMo/Speech#775: an eps that is not the configured one",
    bound="equality",
)
def test_keywords_arrive_in_fine_tuning(runs: Runs) -> None:
    """In fine-tuning, the optimizer receives betas and eps exactly as the user gave them."""
    given = {"betas": (0.85, 0.99), "eps": 1e-6}
    recipe = replace(tunings(runs)[0], updates=2, optimizer=OptimizerChoice.of(ADAMW, lr=1e-3, **given))
    for update in tuned(runs, recipe).updates:
        optimizer.keywords_arrive(update.groups, given)
