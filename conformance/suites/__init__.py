"""The clauses, one file per chapter: ``pytest -p conformance.plugin --pyargs conformance.suites --subject ...``.

This file has what several chapters share: recipes, and questions about a trace.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from conformance.checks.data import sample_numbers
from conformance.errors import NotApplicable, Violation, describe_error
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Checkpoint, CrossEntropy, Forward, Group, Trace, Update
from conformance.runs import Runs

ADAMW, SGD, RMSPROP = "torch.optim.AdamW", "torch.optim.SGD", "torch.optim.RMSprop"
ADAMW_8BIT, PAGED_8BIT = "bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"
GROK = "grokadamw.GrokAdamW"
DESCENT = OptimizerChoice.of(SGD, lr=0.1)
"""Plain gradient descent: AdamW hides the scale of gradients."""
EIGHT_BIT = OptimizerChoice.of(ADAMW_8BIT, lr=1e-2)
DECAYING = OptimizerChoice.of(ADAMW, lr=1e-2, weight_decay=0.1)
OTHERS = (
    OptimizerChoice.of(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    OptimizerChoice.of(RMSPROP, lr=1e-3, alpha=0.9, momentum=0.9, eps=1e-5, centered=True),
    OptimizerChoice.of("torch.optim.Adam", lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=True),
    OptimizerChoice.of("torch.optim.NAdam", lr=1e-3, weight_decay=0.1, momentum_decay=0.02),
)
"""Optimizers beside AdamW, each with settings that are not its defaults."""
MUON = OptimizerChoice.of("torch.optim.Muon", lr=0.02)
"""For matrices only (https://kellerjordan.github.io/posts/muon): the stack trains the rest with another optimizer."""
REST = OptimizerChoice.of(ADAMW, lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.05)
"""That other one, where the user may choose it."""
SHARED = Recipe(n_head=4, n_kv_head=2)
"""Two heads of keys and values, each for two query heads."""
DRIFT = 1e-3
"""Of the gradient, relative, over six updates whose sums are taken in another order: see DIST-2."""
STILL = 1e-30
"""A learning rate that moves no weight by one bit. Not zero: a schedule may divide by it."""


def shapes(runs: Runs, recipe: Recipe | None = None) -> list[Recipe]:
    """Return a recipe for each model shape that the subject has.

    Raises:
        NotApplicable: if it has none.
    """
    found = [replace(recipe or Recipe(), shape=shape) for shape in runs.shapes()]
    if not found:
        raise NotApplicable("lacks both gpt-shape and llama-shape")
    return found


def in_shapes(runs: Runs, recipe: Recipe, judge: Callable[[Recipe], None]) -> None:
    """Judge a recipe in each model shape that the subject has and does not refuse it for.

    Raises:
        NotApplicable: if it has none, or refuses the recipe in all of them.
    """
    each_unless_refused(shapes(runs, recipe), judge)


def each_unless_refused(recipes: Sequence[Recipe], judge: Callable[[Recipe], None]) -> None:
    """Judge each recipe that can be judged.

    Raises:
        NotApplicable: if none can be.
    """
    refusals = []
    for recipe in recipes:
        try:
            judge(recipe)
        except NotApplicable as refusal:
            refusals.append(refusal)
    if len(refusals) == len(recipes):
        raise refusals[0]


def everyday(runs: Runs, optimizer: OptimizerChoice | None = None) -> Recipe:
    """Return a run as people make them, with all of these that the subject has: microbatches, schedule, evaluation.

    Clauses that share it share its trace. The optimizer is gradient descent, or, if the subject fixes its own, that.
    """
    if optimizer is None:
        optimizer = DESCENT if runs.has("any-optimizer") else OptimizerChoice()
    recipe = Recipe(microbatch_size=4, updates=6, optimizer=optimizer)
    if runs.has("microbatches"):
        recipe = replace(recipe, microbatch_size=1, microbatches=4)
    if runs.has("schedule"):  # down to a fifth: a stack may refuse a cosine that rises
        recipe = replace(recipe, warmup=2, minimum_lr=optimizer.rate / 5)
    if runs.has("evaluate-every"):
        recipe = replace(recipe, evaluate_every=2)
    elif runs.has("evaluate"):
        recipe = replace(recipe, evaluate=True)
    return recipe


def every_day(runs: Runs) -> list[Recipe]:
    """Return the everyday run and, for adapters of 0.2, the same in 16 bits and with tied weights, if the subject can.

    Not in float16: its scaler may leave out the first updates.
    """
    plain = everyday(runs)
    if not runs.asks("0.2"):
        return [plain]
    coarse = [replace(plain, precision=name) for name in runs.precisions() if name.startswith("bf16")]
    return [plain, *coarse[:1], *tied(runs, plain)]


def tied(runs: Runs, recipe: Recipe) -> list[Recipe]:
    """Return the same run with tied weights, for adapters of 0.2; nothing if the subject has none."""
    return [replace(recipe, tied=True)] if runs.has("tied") and runs.asks("0.2") else []


def setting(recipe: Recipe) -> str:
    """Return in which respect a run is not the plain one, to begin a message with: "bf16-mixed, tied weights: "."""
    words: list[str] = [recipe.precision] if recipe.precision != "32-true" else []
    words += ["tied weights"] if recipe.tied else []
    return f"{', '.join(words)}: " if words else ""


def dropping(runs: Runs, recipe: Recipe, probability: float = 0.1) -> Recipe:
    """Return the same run with dropout, if the subject has some."""
    return replace(recipe, dropout=probability) if runs.has("dropout") else recipe


def interrupted(runs: Runs) -> Recipe:
    """Return a run with all that a checkpoint must hold: moments, a schedule, dropout where there is any."""
    return dropping(runs, replace(everyday(runs, DECAYING), save_every=2))


def require_still(run: Trace) -> None:
    """Raise NotApplicable if weights moved in a run whose rate was to move none: the stack takes another rate."""
    for update in run.updates:
        if any(bool(((tensor - update.after[name]).abs() > 1e-20).any()) for name, tensor in update.before.items()):
            raise NotApplicable(f"the weights move although the recipe asks for a learning rate of {STILL:g}")


def in_16_bits(runs: Runs, recipe: Recipe) -> list[Recipe]:
    """Return the first update of a run in each 16-bit precision that the subject has, without schedule or evaluation.

    Raises:
        NotApplicable: if it has none.
    """
    plain = replace(recipe, updates=1, warmup=0, minimum_lr=None, evaluate=False, evaluate_every=None)
    found = [replace(plain, precision=name) for name in runs.precisions() if name != "32-true"]
    if not found:
        raise NotApplicable("lacks all of bf16-mixed, bf16-true and 16-mixed")
    return found


def clipped(recipe: Recipe, norm: float, factor: float) -> Recipe:
    """Return the same run, with a limit that is a multiple of the norm of its first gradient."""
    return replace(recipe, clip=float(f"{factor * norm:.3g}"))  # round: a stack may print it, or parse it


def on_two_ranks(recipe: Recipe) -> Recipe:
    """Return the same updates on two ranks: half of the microbatches, or of each microbatch, on either."""
    if recipe.microbatches > 1:
        return replace(recipe, world_size=2, microbatches=recipe.microbatches // 2)
    return replace(recipe, world_size=2, microbatch_size=recipe.microbatch_size // 2)


def unsharded(runs: Runs) -> Recipe:
    """Return a run in one process with optimizer state and a checkpoint."""
    optimizer = OptimizerChoice.of(SGD, lr=0.1, momentum=0.9) if runs.has("any-optimizer") else OptimizerChoice()
    return Recipe(microbatch_size=4, updates=3, optimizer=optimizer, save_every=3)


def sharded(recipe: Recipe) -> Recipe:
    """Return the same updates on two ranks, with every parameter split over them."""
    return replace(on_two_ranks(recipe), sharded=True)


def shuffled() -> Recipe:
    """Return two epochs over eight samples that the stack shuffles, four updates each, a checkpoint every second."""
    return Recipe(samples=8, microbatch_size=2, updates=8, save_every=2)


def shuffled_on_two_ranks() -> Recipe:
    """Return the same epochs on two ranks, two updates each."""
    return replace(shuffled(), world_size=2, updates=4)


def odd_epochs() -> Recipe:
    """Return two epochs over seven samples in updates of two, and a checkpoint amid the second."""
    return Recipe(samples=7, microbatch_size=2, updates=7, save_every=5)


def by_update(run: Trace, samples: Tensor) -> list[list[int | None]]:
    """Return the numbers of the samples that each update trains on."""
    found: list[list[int | None]] = [[] for _ in run.updates]
    for forward in run.training_forwards():
        if forward.update < len(found):
            found[forward.update] += sample_numbers(forward.ids, samples)
    return found


def paired(first: Sequence[Update], second: Sequence[Update], what: str) -> Iterator[tuple[int, Update, Update]]:
    """Yield updates of two runs, numbered from 1. Raises Violation if one run made more than the other."""
    if len(first) != len(second):
        raise Violation(f"{what}: {len(first)} updates", f"{len(second)} updates")
    yield from ((number, one, other) for number, (one, other) in enumerate(zip(first, second, strict=True), start=1))


def seen(run: Trace) -> Trace:
    """Return a trace for a rule about optimizers. Raises NotApplicable if one of them could not be seen."""
    if not all(step.optimizer for update in run.updates for step in update.steps):
        raise NotApplicable(" ".join(run.notes) or "the optimizer could not be seen")
    return run


def with_muon(runs: Runs) -> Recipe:
    """Return a run with Muon; the other optimizer is the user's choice where the subject lets them choose."""
    rest = REST if runs.has("second-optimizer") else None
    return Recipe(updates=4, save_every=2 if runs.has("resume") else None, optimizer=MUON, rest=rest)


def beside_muon(runs: Runs, recipe: Recipe) -> Trace:
    """Return the run of a recipe with Muon, in which another optimizer trains what Muon does not take.

    Raises:
        NotApplicable: if the stack refuses Muon, or has only one optimizer.
    """
    runs.trace(replace(recipe, optimizer=OptimizerChoice()))  # a stack that always raises would refuse this too
    tried = runs.attempt(recipe)
    if tried.error is not None:
        raise NotApplicable(f"it does not train with torch.optim.Muon: {describe_error(tried.error)}")
    steps = [step for update in seen(tried.trace).updates for step in update.steps]
    if len({step.optimizer[0] for step in steps}) < 2:
        raise NotApplicable("one optimizer trains every tensor")
    return tried.trace


def rates(runs: Runs, recipe: Recipe, run: Trace) -> list[dict[str, float]]:
    """Return the declared learning rate of each trainable tensor in each update of a recipe."""
    tensors = {name: run.tensors[name] for name in run.trainable}
    return [
        {name: runs.policy.rate(recipe, update, info) for name, info in tensors.items()}
        for update in range(recipe.updates)
    ]


def asked_for(recipe: Recipe, run: Trace) -> list[tuple[Group, ...]]:
    """Return the parameter groups of each update that a recipe asks for. That a run makes no more is for ACC-6."""
    return [update.groups for update in run.updates[: recipe.updates]]


def cross_entropies(runs: Runs, recipe: Recipe, run: Trace) -> list[Tensor]:
    """Return what backward was called on, or the cross entropies themselves if the loss has further terms."""
    if runs.policy.auxiliary_loss(recipe):
        return [entropy.value for entropy in run.entropies if entropy.grad_enabled]
    return [loss.value for loss in run.losses]


def stays_inside(forwards: Sequence[Forward], entropies: Sequence[CrossEntropy]) -> bool:
    """Return True if no logits leave the model, but each of its calls computed one cross entropy, seen by its gate."""
    return bool(forwards) and all(f.logits is None for f in forwards) and len(forwards) == len(entropies)


def mean_of(entropies: Sequence[CrossEntropy]) -> float:
    """Return the mean over all targets of several cross entropies."""
    return sum(found.total for found in entropies) / sum(found.counted for found in entropies)


def saved(run: Trace, update: int) -> Checkpoint:
    """Return the checkpoint after an update. Raises Violation if nothing was written."""
    found = run.checkpoint(update)
    if found is None:
        raise Violation(f"a checkpoint after update {update}", "no file was written there")
    return found
