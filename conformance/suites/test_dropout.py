"""DROP: dropout acts in training, and draws a different mask each time."""

from dataclasses import replace

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from conformance.checks.comparison import same
from conformance.checks.dropout import masks_differ, same_function
from conformance.clause import clause
from conformance.errors import NotApplicable, RunFailed
from conformance.recipe import Recipe
from conformance.recording.trace import Forward
from conformance.runs import Runs
from conformance.suites import STILL, everyday, require_still, shapes
from conformance.suites.test_model import QUICK, ROUGH, is_as_declared


def repeated(runs: Runs, probability: float) -> Recipe:
    """Return updates that move no weight, all on one sequence, in two microbatches each if the subject has some."""
    still = replace(everyday(runs).optimizer, arguments=(("lr", STILL),))
    microbatches = 2 if runs.has("microbatches") else 1
    return Recipe(
        optimizer=still, microbatches=microbatches, dropout=probability, same_batches=True, altered="equal sequences"
    )


def forwards(runs: Runs, recipe: Recipe) -> list[list[Forward]]:
    """Return the training forwards of each update.

    Raises:
        NotApplicable: if they are not on the one sequence asked for, or the weights moved.
    """
    run, row = runs.trace(recipe), recipe.batches()[0][:1, : recipe.block_size]
    require_still(run)
    found = [run.training_forwards(update) for update in range(len(run.updates))]
    for forward in (forward for update in found for forward in update):
        if forward.ids.shape[1] < recipe.block_size or not bool((forward.ids[:, : recipe.block_size] == row).all()):
            raise NotApplicable("the stack does not train on the sequence that the recipe gives: see ACC-6")
    if len(found) < 2 or any(len(update) < recipe.microbatches for update in found):
        raise NotApplicable("the forwards of an update are not the ones asked for: see ACC-6")
    return found


def first_logits(forward: Forward) -> Tensor:
    """Return the logits of the first sequence of a forward."""
    return forward.scores[0]


@clause(
    "DROP-1",
    since="0.2",
    needs=("dropout",),
    why="A model that is trained without the configured dropout overfits; with one fixed mask, only a part of it is "
    "trained.",
    mend="Pass the probability on to every layer, call model.train(), and do not set the same seed again before each "
    "update.",
    source="fairseq2#1038, litgpt finetune (left in eval mode), pytorch.org/docs: torch.manual_seed inside a loop",
    bound="different bits",
)
def test_another_mask_each_update(runs: Runs) -> None:
    """In training, dropout draws a different mask for each update."""
    first, second = forwards(runs, repeated(runs, 0.5))[:2]
    masks_differ(first_logits(first[0]), first_logits(second[0]), "each update")


@clause(
    "DROP-2",
    since="0.2",
    needs=("dropout", "microbatches"),
    why="Microbatches that share a mask make the gradient noisier than dropout on one large batch does.",
    mend="Do not seed or restore the random state between the microbatches of an update.",
    source="allenai/OLMo-core#828 (random state around recomputation), mlcommons/training#844",
    bound="different bits",
)
def test_another_mask_each_microbatch(runs: Runs) -> None:
    """In training, dropout draws a different mask for each microbatch of an update."""
    for first, second in (update[:2] for update in forwards(runs, repeated(runs, 0.5))):
        masks_differ(first_logits(first), first_logits(second), "each microbatch")


@clause(
    "DROP-3",
    since="0.2",
    needs=("dropout",),
    why="A mask that all sequences of a batch share removes the same units from all of them. Where the model drops at "
    "several places, the masks of the others hide it.",
    mend="Draw the mask in the shape of the activations, including the batch dimension.",
    source="Gal and Ghahramani, https://arxiv.org/abs/1512.05287: one mask over time is for each sequence, not for all",
    bound="different bits",
)
def test_another_mask_each_sequence(runs: Runs) -> None:
    """In training, dropout draws a different mask for each sequence of a batch, at every place where the model drops
    activations.
    """
    for update in forwards(runs, repeated(runs, 0.5)):
        for forward in update:
            if len(forward.ids) > 1:
                masks_differ(forward.scores[0], forward.scores[1], "each sequence of a batch")
    one = replace(repeated(runs, 0.5), microbatches=1, n_layer=1, updates=8, dropping="at one place")
    for recipe in shapes(runs, one):
        try:
            each = [update[0].scores for update in forwards(runs, recipe)]
        except RunFailed as error:
            if not isinstance(error.__cause__, CheckpointError):
                raise
            continue  # where activations are recomputed, torch sees that dropout acts in another place than before
        whole = each[-1]  # a layer has fewer places: the last updates drop nothing
        if len(whole) < 2 or not all(same(row, whole[0]) for row in (*whole, *each[-2])):
            continue  # the stack does not drop by torch's dropout, so the suite cannot look at one place
        for number, scores in enumerate(each):
            if not same(scores[0], whole[0]):
                masks_differ(scores[0], scores[1], f"each sequence of a batch, in its call number {number + 1}")


@clause(
    "DROP-4",
    since="0.2",
    needs=("dropout",),
    why="A user who switches dropout off still trains with it, and compares with runs that have none.",
    mend="Pass the configured probability on to every layer; leave no default in a constructor or a kernel call.",
    source="huggingface/transformers GPT2Config (attn_pdrop, embd_pdrop, resid_pdrop default to 0.1)",
    bound="1e-4 of the logits' size (healthy: 0; 0.1 on one residual branch: 0.1)",
)
def test_none_where_none_is_asked_for(runs: Runs) -> None:
    """With a dropout probability of 0, the model in training gives equal logits for equal tokens and equal weights."""
    found = [forward for update in forwards(runs, repeated(runs, 0.0)) for forward in update]
    for logits in (row for forward in found for row in forward.scores):
        same_function(first_logits(found[0]), logits, "training without dropout, on equal tokens")


@clause(
    "DROP-5",
    since="0.2",
    needs=("dropout",),
    why="A place that does not drop is not regularised. If what is kept is not scaled, evaluation gets activations of "
    "another size than training.",
    mend="Hand the probability on to every place that the policy declares, and divide what is kept by 1 - p.",
    source="jadore801120/attention-is-all-you-need-pytorch#40, lucidrains/reformer-pytorch#55, "
    "salesforce/awd-lstm-lm#124",
    bound="1e-3 of the logits' size (healthy: 8e-7; weakest mutant, none in attention: 0.17)",
)
def test_dropout_acts_where_declared(runs: Runs) -> None:
    """In training, dropout acts at each place that the stack declares and at no other, and scales what it keeps by
    1 / (1 - p): if it keeps everything, the logits are those of the declared forward with these factors.
    """
    chance = 0.25
    for recipe in shapes(
        runs, Recipe(dropout=chance, dropping="nowhere", same_batches=True, altered="equal sequences")
    ):
        run = runs.trace(replace(recipe, updates=4, optimizer=QUICK))
        if any(not same(row, forward.scores[0]) for forward in run.training_forwards(0) for row in forward.scores):
            raise NotApplicable(
                "the stack does not drop by torch's dropout, so the suite cannot have it keep everything"
            )
        is_as_declared(runs, recipe, lambda activations: activations / (1 - chance), ROUGH)
