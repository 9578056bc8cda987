"""Rules of a table that is both embedding and head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from conformance.errors import Violation

# Of what the head gives a row. Where the lookup gives no gradient, 2e-7 is seen; in healthy runs 12 and more.
LOOKUP_BOUND = 1e-2


def lookup_and_head_learn(gradient: Tensor, logits: Tensor, looked_up: Sequence[int], unseen: Sequence[int]) -> None:
    """Check that the gradient of a tied table comes from the lookup and from the head.

    To the row of a token that is no target, the head gives the hidden states of the sequence, each times the
    probability of that token. The hidden states follow from the rows of tokens that are not in the sequence at all, by
    least squares, and with them what the head gives to every other row.

    Args:
        gradient: of the table, (V, C), of the mean cross entropy of one sequence.
        logits: of that sequence, (T, V).
        looked_up: tokens that the model reads and never has to predict.
        unseen: tokens that it neither reads nor has to predict, more of them than T.

    Raises:
        Violation: if one of the two gives nothing.
    """
    rows, shares = gradient.double(), logits.double().softmax(dim=-1).T / len(logits)  # (V, C) and (V, T)
    known, read = list(unseen), list(looked_up)
    if not rows[known].any():
        raise Violation(
            "the head gives a gradient to the rows of all tokens",
            "the rows of tokens that are not in the sequence have none",
        )
    hidden = torch.linalg.lstsq(shares[known], rows[known]).solution  # (T, C)
    of_head = shares[read] @ hidden
    beside = ((rows[read] - of_head).norm() / of_head.norm()).item()
    if not beside > LOOKUP_BOUND:
        raise Violation(
            "the gradient of a row that is looked up is what the lookup and the head give, together",
            f"it is what the head alone gives, up to {beside:.1g} of that",
        )
