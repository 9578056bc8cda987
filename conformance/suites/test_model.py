"""MODEL: the model computes the function that its stack declares."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from conformance.checks.dropout import same_function
from conformance.clause import clause
from conformance.errors import NotApplicable
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Named
from conformance.runs import Runs
from conformance.suites import ADAMW, SHARED, in_shapes, shapes

QUICK = OptimizerChoice.of(ADAMW, lr=0.1)
"""Moves the weights far, in a few updates: at small ones an activation is nearly a line."""
BOUND = 1e-5  # of the root mean square of the logits
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
