"""MODEL: the model computes the function that its stack declares."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.checks.accumulation import gradients_agree
from conformance.checks.comparison import same
from conformance.checks.data import next_tokens, sample_numbers
from conformance.checks.dropout import same_function
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Named
from conformance.runs import Runs
from conformance.suites import ADAMW, SHARED, in_shapes, shapes

QUICK = OptimizerChoice.of(ADAMW, lr=0.1)
"""Moves the weights far, in a few updates: at small ones an activation is nearly a line."""
BOUND = 1e-5  # of the root mean square of the logits
SLOPE = 1e-4  # of the gradient vector
ROUGH = 1e-3  # where weights can make the noise larger (1.9e-5 seen), and every fault that is looked for is large


def is_as_declared(
    runs: Runs, recipe: Recipe, drop: Callable[[Tensor], Tensor] | None = None, bound: float = BOUND
) -> None:
    """Check the logits of the first and of the last update of a run against the declared ones.

    Args:
        runs: of the subject.
        recipe: of the run, but for its updates and its optimizer.
        drop: what dropout does to activations, if there is some.
        bound: of the root mean square of the logits.
    """
    run = runs.trace(replace(recipe, updates=4, optimizer=QUICK))
    for number in (0, -1):
        update = run.update(number)
        first = next(iter(run.training_forwards(number % len(run.updates))), None)
        if first is None:
            raise NotApplicable("no forward in training mode and with gradients: see ACC-6")
        weights = {name: update.before[info.name].double() for info in run.tensors.values() for name in info.names}
        expected = runs.policy.logits(recipe, Named(weights), first.ids.long(), drop)
        when = "first" if number == 0 else "last"
        what = f"{recipe.shape}, {when} update: the declared forward in float64 against the model's"
        what += "" if drop is None else ", with dropout that keeps everything and scales it"
        same_function(expected, first.scores, what, bound)


@clause(
    "MODEL-1",
    since="0.2",
    why="If the model uses an activation, an epsilon or a scale other than the declared one, its weights mean "
    "something else in every other program.",
    mend="Compare the model's forward with the declared one, layer by layer, starting at the embedding.",
    source="KellerJordan/modded-nanogpt#39 (positions); GELU by tanh and by erf, which frameworks call alike",
    bound="1e-5 of the logits' size (healthy: 1.1e-6; weakest mutant, GELU by erf for GELU by tanh: 8e-5)",
)
def test_declared_forward(runs: Runs) -> None:
    """The logits equal those of the forward that the stack declares, computed in float64 from the same weights."""
    for recipe in shapes(runs):
        is_as_declared(runs, recipe)


@clause(
    "MODEL-2",
    since="0.2",
    needs=("tied",),
    why="A tied head may be scaled or transposed by mistake, and only its logits show it.",
    mend="Multiply by the embedding's own weight, unchanged.",
    source="T5 and Gemma scale a tied head or table; huggingface/transformers has both conventions",
    bound="as MODEL-1",
)
def test_declared_forward_tied(runs: Runs) -> None:
    """If embedding and head are tied, the model's logits still equal those of the forward that the stack declares,
    computed in float64 from the same weights.
    """
    for recipe in shapes(runs):
        is_as_declared(runs, replace(recipe, tied=True))


@clause(
    "MODEL-3",
    since="0.2",
    needs=("grouped-query",),
    why="If query heads use the keys of another group than the declared one, the weights mean something else in every "
    "other program.",
    mend="Give each head of keys and values to query heads that stand in a row: repeat_interleave, not repeat. If your "
    "stack has no such heads, name grouped-query in lacks.",
    source="EricLBuehler/candle-vllm#52, jxiw/M1#4 (heads repeated in another order)",
    bound="1e-3 of the logits' size (healthy: 1.3e-6, and up to 1.9e-5 with other weights; heads in another order: "
    "0.7)",
)
def test_declared_forward_of_shared_heads(runs: Runs) -> None:
    """If query heads share heads of keys and values, the model's logits still equal those of the forward that the stack
    declares, computed in float64 from the same weights.
    """
    in_shapes(runs, SHARED, lambda recipe: is_as_declared(runs, recipe, bound=ROUGH))


def has_its_setting(runs: Runs, recipe: Recipe, field: str, capability: str) -> None:
    """Check that a setting of the model reaches the forward, and gives the function that the stack declares for it.

    Args:
        runs: of the subject.
        recipe: with the setting.
        field: of the recipe, which is None where its user leaves the setting to the stack.
        capability: that the subject must have.

    Raises:
        Violation: if the logits are the same with the setting and without it, in every shape of the model.
    """
    recipe, usual = (replace(each, updates=4, optimizer=QUICK) for each in (recipe, Recipe()))  # as MODEL-1
    acts = False
    for given, plain in zip(shapes(runs, recipe), shapes(runs, usual), strict=True):
        found = [runs.trace(each).training_forwards(0)[:1] for each in (given, plain)]
        runs.require_read(given, field, capability)
        if not all(found):
            raise NotApplicable("no forward in training mode and with gradients: see ACC-6")
        (one,), (other,) = found
        acts = acts or not same(one.scores, other.scores)
    if not acts:
        value = getattr(recipe, field)
        raise Violation(
            f"other logits with {field}={value:g} than without it, in a model that has such a setting",
            "they are equal, bit for bit: the option does nothing",
        )
    with contextlib.suppress(NotApplicable):  # the policy need not declare the forward
        in_shapes(runs, recipe, lambda each: is_as_declared(runs, each))


@clause(
    "MODEL-4",
    since="0.2",
    needs=("rotary-base",),
    why="A model that is trained with another base than the one in its configuration gets positions that nobody knows: "
    "it is served with the configured base, and loses its way in long texts.",
    mend="Hand the configured base on to the code that computes the rotary tables. If your stack has no such setting, "
    "name rotary-base in lacks.",
    source="sgl-project/SpecForge#265, vllm-project/vllm#9503 (10000 whatever the configuration says)",
    bound="different bits; as MODEL-1 where the policy declares the forward",
)
def test_base_of_rotary_positions(runs: Runs) -> None:
    """If the user sets the base of the rotary positions, the model computes its positions with that base."""
    has_its_setting(runs, Recipe(rotary_base=200.0), "rotary_base", "rotary-base")


@clause(
    "MODEL-5",
    since="0.2",
    needs=("norm-eps",),
    why="Norms with another epsilon than the configured one make the weights mean something else wherever activations "
    "are small.",
    mend="Hand the configured epsilon on to every norm, the last one included. If your stack has no such setting, name "
    "norm-eps in lacks.",
    source="huggingface/transformers#38025 (eps is not passed on), NVIDIA-NeMo/Megatron-Bridge#5712 (1e-5 whatever the "
    "configuration says)",
    bound="different bits; as MODEL-1 where the policy declares the forward",
)
def test_epsilon_of_norms(runs: Runs) -> None:
    """If the user sets the epsilon of the norms, the model computes its norms with that epsilon."""
    has_its_setting(runs, Recipe(norm_eps=1e-3), "norm_eps", "norm-eps")


@clause(
    "MODEL-6",
    since="0.2",
    why="A part that is detached, or a backward that was written by hand, trains another model than the one whose "
    "logits are right: no forward shows it.",
    mend="Look for detach(), no_grad() and custom autograd functions in the tensors named here, and for code that "
    "changes gradients between backward and step.",
    source="paiml/entrenar#314, NVIDIA/Megatron-LM#299 (the two gradients of a tied table); pytorch#148831",
    bound="1e-4 of the gradient vector, up to one factor for all tensors, which is ACC-5's (healthy: 7e-7; weakest "
    "mutant, a norm that gives no gradient to what is before it: 0.2)",
)
def test_gradient_of_the_declared_forward(runs: Runs) -> None:
    """The gradient of the first and of the last update is that of the cross entropy of the forward that the stack
    declares, computed in float64 from the same weights, with a head of its own and with a tied one.
    """
    for recipe in shapes(runs):
        for each in [recipe, replace(recipe, tied=True)] if runs.has("tied") else [recipe]:
            has_declared_gradient(runs, replace(each, updates=4, optimizer=QUICK))


def has_declared_gradient(runs: Runs, recipe: Recipe) -> None:
    """Check the first and the last gradient of a run with one microbatch."""
    if runs.policy.auxiliary_loss(recipe):
        raise NotApplicable("the policy declares that the loss has terms besides the cross entropy")
    run, rows = runs.trace(recipe), torch.cat(recipe.batches())
    for number in (0, -1):
        update = run.update(number)
        found = run.training_forwards(number % len(run.updates))
        numbers = [n for forward in found for n in sample_numbers(forward.ids, rows) if n is not None]
        if len(found) != 1 or len(numbers) != len(found[0].ids):
            raise NotApplicable("the forward of an update is not the one asked for: see ACC-6")
        own = {name: update.before[name].double().requires_grad_() for name in run.trainable}
        rest = {name: update.before[name].double() for name in run.tensors if name not in own}
        weights = {name: (own | rest)[info.name] for info in run.tensors.values() for name in info.names}
        logits = runs.policy.logits(recipe, Named(weights), found[0].ids.long())
        if not logits.requires_grad:
            raise NotApplicable("the declared forward cuts its result off from the weights")
        scores, targets = next_tokens(logits, rows[numbers])
        entropy = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        slopes = dict(zip(own, torch.autograd.grad(entropy, list(own.values()), allow_unused=True), strict=True))
        agree_up_to_a_factor(
            slopes, update.gradients, f"{recipe.shape}{', tied weights' if recipe.tied else ''}", number
        )


def agree_up_to_a_factor(
    expected: Mapping[str, Tensor | None], seen: Mapping[str, Tensor | None], where: str, number: int
) -> None:
    """Check that gradients are the declared ones, times one number for all of them."""
    both = [
        (slope, found) for name, slope in expected.items() if slope is not None and (found := seen[name]) is not None
    ]
    along = [(torch.sum(slope * found.double()) / slope.square().sum()).item() for slope, found in both if slope.any()]
    factor = median(along) if along else 1.0  # so one tensor with another factor is the one that is told
    factor = factor if factor > 0 else 1.0
    given = {name: None if (found := seen[name]) is None else found.double() / factor for name in expected}
    when = "first" if number == 0 else "last"
    gradients_agree(expected, given, f"{where}, {when} update: the gradient against the declared forward's", SLOPE)
