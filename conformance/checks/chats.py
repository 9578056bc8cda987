"""Rules of training on chats: what the assistant says is predicted, its end included, and nothing else."""

from collections.abc import Iterable

from torch import Tensor

from conformance.chats import ANSWERING, END_ID
from conformance.checks.data import IGNORED
from conformance.errors import NotApplicable, Violation


def answers_are_targets(microbatches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Check which tokens of chats are targets. The words of an answer have ids of their own: see conformance.chats.

    Args:
        microbatches: the ids that go into the model, and the targets of their positions, both (B, T); -100 where there
            is none.

    Raises:
        NotApplicable: if no turn of the assistant ends in what the model sees.
        Violation: with the numbers of tokens.
    """
    ends = left_out = lost = more = 0
    for ids, targets in microbatches:
        here, following, given = ids[:, :-1], ids[:, 1:], targets[:, :-1]  # the next token of the last is not seen
        speaks = (here >= ANSWERING.start) & (here < ANSWERING.stop)
        word, end = (following >= ANSWERING.start) & (following < ANSWERING.stop), speaks & (following == END_ID)
        marked = given != IGNORED
        ends, left_out = ends + int(end.sum()), left_out + int((end & ~marked).sum())
        lost, more = lost + int((word & ~marked).sum()), more + int((marked & ~word & ~end).sum())
    if not ends:
        raise NotApplicable("no turn of the assistant ends in a sequence that the model sees")
    if left_out or lost or more:
        raise Violation(
            f"the assistant's words are targets, and so is the end of each of its {ends} turns, and nothing else",
            f"not targets: {left_out} ends of turns and {lost} of the assistant's words; {more} other targets",
        )
