"""MODEL: the model computes the function that its stack declares."""

from dataclasses import replace

from conformance.checks.dropout import same_function
from conformance.clause import clause
from conformance.errors import NotApplicable
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Named
from conformance.runs import Runs
from conformance.suites import ADAMW, shapes

QUICK = OptimizerChoice.of(ADAMW, lr=0.1)
"""Moves the weights far, in a few updates: at small ones an activation is nearly a line."""
BOUND = 1e-5  # of the root mean square of the logits


def is_as_declared(runs: Runs, recipe: Recipe) -> None:
    """Check the logits of the first and of the last update of a run against the declared ones."""
    run = runs.trace(replace(recipe, updates=4, optimizer=QUICK))
    for number in (0, -1):
        update = run.update(number)
        first = next(iter(run.training_forwards(number % len(run.updates))), None)
        if first is None:
            raise NotApplicable("no forward in training mode and with gradients: see ACC-6")
        weights = {name: update.before[info.name].double() for info in run.tensors.values() for name in info.names}
        expected = runs.policy.logits(recipe, Named(weights), first.ids.long())
        when = "first" if number == 0 else "last"
        what = f"{recipe.shape}, {when} update: the declared forward in float64 against the model's"
        same_function(expected, first.scores, what, BOUND)


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
