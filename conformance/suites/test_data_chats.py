"""DATA, continued: chats."""

from conformance.checks.chats import answers_are_targets
from conformance.clause import clause
from conformance.errors import NotApplicable
from conformance.recipe import Recipe
from conformance.runs import Runs


@clause(
    "DATA-14",
    since="0.2",
    needs=("chats",),
    why="A model that never learns the end of its turn does not stop, and one that learns the user's words asks itself "
    "questions.",
    mend="Mark as targets what the template's generation marks enclose, with the token that ends the turn. If your "
    "stack takes no chats, name chats in lacks.",
    source="meta-pytorch/torchtune#949, mll-lab-nu/RAGEN#59 (the end of a turn is no target)",
    bound="the targets themselves",
)
def test_answers_of_chats(runs: Runs) -> None:
    """Of chats, what the assistant says is predicted, the end of each of its turns included, and nothing else is."""
    recipe = Recipe(chats=True, block_size=48, updates=4)
    run = runs.trace(recipe)
    runs.require_read(recipe, "conversations", "chats")
    forwards, entropies = run.training_forwards(), [entropy for entropy in run.entropies if entropy.grad_enabled]
    ids = [forward.ids.long() for forward in forwards]
    if not ids or [each.numel() for each in ids] != [len(entropy.labels) for entropy in entropies]:
        raise NotApplicable("no call of cross_entropy shows the targets of each position")
    answers_are_targets((each, entropy.labels.view_as(each)) for each, entropy in zip(ids, entropies, strict=True))
