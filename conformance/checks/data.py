"""Rules of which samples are seen, in which order, and what is predicted from them."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from conformance.errors import Violation, quoted

IGNORED = -100  # a target that is not to be predicted


def sample_numbers(ids: Tensor, samples: Tensor) -> list[int | None]:
    """Return the number of the sample that each sequence is; None for a sequence that is not a sample.

    Args:
        ids: (B, T) or, of stacks that shift inside the model, (B, T + 1).
        samples: (N, T + 1).
    """
    length = samples.shape[1] - 1
    if ids.shape[1] not in (length, length + 1):
        return [None] * len(ids)
    same = (ids[:, None, :length].long() == samples[None, :, :length]).all(dim=-1)  # (B, N)
    return [int(row.int().argmax()) if row.any() else None for row in same]


def places_in_document(ids: Tensor, document: Tensor) -> tuple[int, int]:
    """Return where a window begins in a document, and for how many tokens it goes on as the document does.

    Args:
        ids: of the window, (T,); what is behind its end may be anything.
        document: (N,), int64, in which no three tokens stand in the same order twice.

    Returns:
        the place of its first token, and the length; (0, 0) if not even three tokens are those of the document.
    """
    best = (0, 0)
    for first in (document == ids[0]).nonzero().flatten().tolist():
        part = document[first : first + len(ids)]
        unlike = (part != ids[: len(part)]).nonzero()
        length = int(unlike[0]) if len(unlike) else len(part)
        best = max(best, (first, length), key=lambda found: found[1])
    return best if best[1] >= 3 else (0, 0)


def once_each(seen: Sequence[int | None], samples: int, what: str) -> None:
    """Check that every sample was seen exactly once, and nothing else.

    Raises:
        Violation: with the numbers of those that were not.
    """
    count = Counter(seen)
    lost = [number for number in range(samples) if number not in count]
    repeated = [f"{number} ({times} times)" for number, times in count.items() if number is not None and times > 1]
    if lost or repeated or count[None]:
        raise Violation(
            f"{what}: each of {samples} samples once",
            f"not seen: {quoted(lost) or 'none'}; more than once: {quoted(repeated) or 'none'}; "
            f"sequences that are not a sample: {count[None]}",
        )


def next_tokens(logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits that have a target, and their targets.

    Args:
        logits: (B, T, V) or (B, T + 1, V).
        rows: labels of the same sequences, (B, T + 1).

    Returns:
        (B, T, V) and (B, T).
    """
    return logits[:, : rows.shape[1] - 1], rows[:, 1:]


def mean_entropy(logits: Tensor, targets: Tensor) -> float:
    """Return the mean cross entropy over the targets that are not ignored, computed in float64."""
    return F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), ignore_index=IGNORED).item()


def sequence_entropies(logits: Tensor, ids: Tensor, rows: Tensor) -> list[float | None]:
    """Return the mean cross entropy of each sequence's next tokens; None for a sequence that is not a row.

    Args:
        logits: of the sequences, (B, T, V) or (B, T + 1, V).
        ids: of the sequences, (B, T) or (B, T + 1).
        rows: known ones with the token behind each, (N, T + 1).
    """
    return [
        None if number is None else mean_entropy(*next_tokens(one[None], rows[number][None]))
        for one, number in zip(logits, sample_numbers(ids, rows), strict=True)
    ]


# Spread of loss / cross entropy over the microbatches, relative. Healthy runs show 3e-7; targets that are shifted by
# another number of tokens, 4e-3 and more.
SHIFT_BOUND = 1e-4


def predicts_next(logits: Sequence[Tensor], rows: Sequence[Tensor], losses: Sequence[float]) -> None:
    """Check that the losses are those of predicting each next token, up to a factor that all share.

    Args:
        logits: of at least two microbatches, (B, T, V) or (B, T + 1, V).
        rows: their tokens, (B, T + 1).
        losses: their losses.

    Raises:
        Violation: saying which token is predicted instead, if one is.
    """
    spreads = {}
    for shift, name in enumerate(("the token itself", "the next token", "the token after the next")):
        length = rows[0].shape[1] - max(1, shift)
        entropies = [mean_entropy(x[:, :length], t[:, shift : shift + length]) for x, t in zip(logits, rows)]
        factors = [loss / entropy for loss, entropy in zip(losses, entropies, strict=True)]
        spreads[name] = max(factors) / min(factors) - 1
    if not spreads["the next token"] <= SHIFT_BOUND:
        fitting = [name for name, spread in spreads.items() if spread <= SHIFT_BOUND]
        raise Violation(
            f"losses that are the cross entropy of the next token, up to one factor (within {SHIFT_BOUND:g})",
            f"they are that of {fitting[0]}" if fitting else f"the factor varies by {spreads['the next token']:.1e}",
        )


def divided_by_counts(logits: Sequence[Tensor], rows: Sequence[Tensor], losses: Sequence[float]) -> bool:
    """Return True if each loss is the sum of the cross entropies of the next tokens, divided by a whole number.

    transformers' Trainer divides by one target too many in each sequence of a GPT-2: other clauses judge by how many.

    Args:
        logits: of each microbatch, (B, T, V) or (B, T + 1, V).
        rows: their tokens, (B, T + 1); -100 is ignored.
        losses: their losses.
    """
    length = rows[0].shape[1] - 1
    for scores, tokens, loss in zip(logits, rows, losses, strict=True):
        targets = tokens[:, 1:]
        total = mean_entropy(scores[:, :length], targets) * int((targets != IGNORED).sum())
        number = total / loss if loss else 0.0
        if round(number) < 1 or abs(number - round(number)) > 1e-3:
            return False
    return True


def counts_declared_targets(
    logits: Sequence[Tensor], rows: Sequence[Tensor], labels: Sequence[Tensor], losses: Sequence[float]
) -> None:
    """Check that the losses are those of the targets that count, up to a factor that all share.

    Args:
        logits: of at least two microbatches, (B, T, V) or (B, T + 1, V).
        rows: their tokens, (B, T + 1).
        labels: the same, with -100 for each token that is no target.
        losses: their losses, each the mean or the sum over its targets.

    Raises:
        Violation: saying which tokens are targets instead, if those are known.
    """
    behind = [tokens.clone() for tokens in rows]
    for tokens, given in zip(behind, labels, strict=True):
        tokens[:, 1:].masked_fill_(given[:, :-1] == IGNORED, IGNORED)
    found = {}
    for name, targets in (
        ("those", labels),
        ("all tokens", rows),
        ("the token behind each, as if the mask were that of the inputs", behind),
    ):
        counts = [int((given[:, 1:] != IGNORED).sum()) for given in targets]
        means = [mean_entropy(*next_tokens(scores, given)) for scores, given in zip(logits, targets, strict=True)]
        sums = [mean * count for mean, count in zip(means, counts, strict=True)]
        factors = [[loss / value for loss, value in zip(losses, values, strict=True)] for values in (means, sums)]
        found[name] = min(max(each) / min(each) - 1 for each in factors)
    if not found["those"] <= SHIFT_BOUND and not divided_by_counts(logits, labels, losses):
        instead = [name for name, spread in found.items() if spread <= SHIFT_BOUND]
        raise Violation(
            "losses that are the cross entropy of the tokens marked as targets, and of no others, up to one factor "
            f"(within {SHIFT_BOUND:g})",
            f"they are that of {instead[0]}" if instead else f"the factor varies by {found['those']:.1e}",
        )


def targets_are_next(targets: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Check that the targets of cross entropies are each token's next one.

    Args:
        targets: of each microbatch, flattened, as the cross entropy got them.
        rows: their tokens, (B, T + 1).

    Raises:
        Violation: saying which token is the target instead, if one is.
    """
    found = {}
    for shift, name in enumerate(("the token itself", "the next token", "the token after the next")):
        wanted = [tokens[:, shift:] for tokens in rows]
        found[name] = all(fits(seen, tokens) for seen, tokens in zip(targets, wanted, strict=True))
    if not found["the next token"]:
        instead = [name for name, fitting in found.items() if fitting]
        raise Violation(
            "the target of each position is the next token",
            f"it is {instead[0]}" if instead else "it is some other token",
        )


def fits(targets: Tensor, tokens: Tensor) -> bool:
    """Return True if targets, flattened, are these tokens (B, N) as far as both go, and those beyond are ignored."""
    if len(targets) % len(tokens):
        return False
    rows = targets.view(len(tokens), -1)
    length = min(rows.shape[1], tokens.shape[1])
    return bool((rows[:, :length] == tokens[:, :length]).all() and (rows[:, length:] == IGNORED).all())


def leftovers_as_declared(
    updates: Sequence[Sequence[int | None]], samples: int, size: int, word: str, what: str
) -> None:
    """Check what happens to the samples at the end of an epoch that fill no update.

    Args:
        updates: numbers of the samples that each update trains on, over all ranks.
        samples: in an epoch; ``size`` does not divide them.
        size: samples of a full update.
        word: what is declared: carried, short, dropped or repeated (see conformance.subject.Leftovers).
        what: what fills no batch, for the message.

    Raises:
        Violation: with the epoch that is not as declared.
    """
    flat = [number for update in updates for number in update]
    if word == "carried":
        epochs = [flat[first : first + samples] for first in range(0, len(flat) - samples + 1, samples)]
        length = samples
    else:
        count = samples // size if word == "dropped" else -(-samples // size)
        groups = [updates[first : first + count] for first in range(0, len(updates) - count + 1, count)]
        epochs = [[number for update in group for number in update] for group in groups]
        length = {"dropped": samples // size * size, "short": samples}.get(word, count * size)
    for number, epoch in enumerate(epochs, start=1):
        known = {sample for sample in epoch if sample is not None}
        if len(epoch) != length or len(known) != min(length, samples):
            declared = (
                f"{what} at the end of an epoch are {word}: {min(length, samples)} of {samples} samples in an epoch"
            )
            again = f", {length - samples} of them twice" if length > samples else ""
            raise Violation(
                declared + again,
                f"{len(known)} in epoch {number}, in {len(epoch)} sequences: {quoted(epoch, limit=12)}",
            )
    sizes = {len(update) for update in updates}
    if word != "short" and sizes != {size}:
        raise Violation(f"{size} sequences in every update", f"updates of {quoted(sorted(sizes))} sequences")
