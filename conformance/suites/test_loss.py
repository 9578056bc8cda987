"""LOSS: what is minimised is the cross entropy of the next tokens, and nothing else that is not declared."""

import torch

from conformance.checks.data import predicts_next, sample_numbers, sequence_entropies
from conformance.checks.loss import nothing_else
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation
from conformance.recipe import OptimizerChoice, Recipe
from conformance.recording.trace import Trace
from conformance.runs import Runs
from conformance.suites import ADAMW, everyday, stays_inside


def entropies_of(recipe: Recipe, run: Trace) -> list[float]:
    """Return the mean cross entropy of each training forward, from its logits or, if none leave it, from its gate.

    Raises:
        NotApplicable: if they cannot be paired with the losses.
    """
    forwards, rows = run.training_forwards(), torch.cat(recipe.batches())
    computed = [entropy for entropy in run.entropies if entropy.grad_enabled]
    if not forwards or len(forwards) != len(run.losses):
        raise NotApplicable(f"{len(forwards)} training forwards, but {len(run.losses)} losses: cannot pair them")
    if stays_inside(forwards, computed):
        return [entropy.total / entropy.counted for entropy in computed]
    found: list[float] = []
    for forward in forwards:
        each = sequence_entropies(forward.scores, forward.ids, rows)
        known = [one for one in each if one is not None]
        if len(known) != len(each):
            raise NotApplicable("the stack trains on sequences other than those asked for: see ACC-6")
        found.append(sum(known) / len(known))
    return found


@clause(
    "LOSS-1",
    since="0.2",
    why="A term that nobody asked for changes every gradient, and makes the loss incomparable with that of other runs.",
    mend="Look for a z-loss, a loss that balances experts, a penalty on weights or label smoothing that is on by "
    "default. If you mean it, declare it in policy.auxiliary_loss().",
    source="allenai/OLMo-core#702 (a z-loss though switched off), NVIDIA/Megatron-LM#1652",
    bound="1e-5 of the cross entropy, in the mean over six updates (healthy: 1e-7; a z-loss of 1e-5: 5e-5)",
)
def test_cross_entropy_and_nothing_else(runs: Runs) -> None:
    """The training loss is the cross entropy of the next tokens, and has no other term."""
    recipe = everyday(runs)
    if runs.policy.auxiliary_loss(recipe):
        raise NotApplicable("the policy declares that the loss has terms besides the cross entropy")
    run = runs.trace(recipe)
    smoothed = {entropy.label_smoothing for entropy in run.entropies if entropy.grad_enabled} - {0.0}
    if smoothed:
        raise Violation("a cross entropy with no label smoothing", f"label_smoothing is {max(smoothed):g}")
    nothing_else([loss.value.double().item() for loss in run.losses], entropies_of(recipe, run))


@clause(
    "LOSS-2",
    since="0.2",
    needs=("any-optimizer",),
    why="A cap on the logits shows nothing while they are small, and bends the loss as soon as the model is sure of "
    "itself.",
    mend="Give the loss the logits of the model as they are; if a cap belongs to the model, let its logits have it.",
    source="tdrussell/qlora-pipe#18 (Gemma's cap of the logits), unslothai/unsloth-zoo#593",
    bound="a spread of 1e-4 in loss / cross entropy over eight updates (healthy: 3e-7; logits capped at 30: 3e-3)",
)
def test_loss_of_large_logits(runs: Runs) -> None:
    """The training loss is the cross entropy of the model's logits, up to one factor, also when the logits are
    large.
    """
    recipe = Recipe(updates=8, optimizer=OptimizerChoice.of(ADAMW, lr=0.1), same_batches=True)
    if runs.policy.auxiliary_loss(recipe):
        raise NotApplicable("the policy declares that the loss has terms besides the cross entropy")
    run, rows = runs.trace(recipe), torch.cat(recipe.batches())
    forwards, losses = run.training_forwards(), run.losses
    numbers = [sample_numbers(forward.ids, rows) for forward in forwards]
    if not forwards or len(forwards) != len(losses) or any(None in found for found in numbers):
        raise NotApplicable("losses and sequences cannot be paired: see ACC-6")
    if any(forward.logits is None for forward in forwards):
        raise NotApplicable("no logits leave the model")
    tokens = [torch.stack([rows[number] for number in found if number is not None]) for found in numbers]
    predicts_next([f.scores for f in forwards], tokens, [loss.value.double().item() for loss in losses])
