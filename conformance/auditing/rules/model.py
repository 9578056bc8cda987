"""The model: the modes of its parts, and what a logit depends on."""

from conformance.auditing.facts import Facts
from conformance.auditing.rule import Doubt, Seen, rule
from conformance.auditing.rules.data import ALIEN, agreement, paired, training
from conformance.errors import NotApplicable, Violation, quoted


@rule(
    "eval-mode",
    "model",
    why="In eval mode dropout is off and batch norms do not learn: another model is trained than you think.",
    mend="Call model.train() after every evaluation, sampling and loading.",
    source="nanoGPT: estimate_loss ends with model.train()",
)
def in_training_mode(seen: Seen) -> None:
    """The model is in training mode whenever it trains."""
    facts = seen.facts
    forwards = training(facts)
    bad = [forward for forward in forwards if not forward.training]
    if bad:
        words = f"{len(bad)} of {len(forwards)} training forwards in eval mode"
        matters = facts.dropout or facts.normalises_batch
        raise (Violation if matters else Doubt)("training mode", words if matters else f"{words}, without dropout")


@rule(
    "parts-in-eval-mode",
    "model",
    why="A part in eval mode drops nothing while the rest does.",
    mend="Call train() on the whole model, or keep the part in eval mode on purpose (a frozen part).",
    source="torchtitan: modes of submodules",
)
def one_mode(seen: Seen) -> None:
    """All parts of the model are in the same mode."""
    other = {name for forward in training(seen.facts) for name in forward.other_mode}
    if not other:
        return
    trained = {name for name, info in seen.facts.trace.tensors.items() if info.trainable}
    silent = other & set(seen.facts.dropout)  # dropout that is off: it matters where what is around it is trained
    around = {part for part in other if any(name.startswith(f"{part}.") for name in trained)}
    off = sorted(name for name in silent if any(name.startswith(f"{part}.") or name == part for part in around))
    words = f"in another mode than the model: {quoted(sorted(other))}"
    raise (Violation if off else Doubt)("one mode", f"{words}; dropout is off in {quoted(off)}" if off else words)


def probed(seen: Seen, value: object) -> None:
    """Raise NotApplicable with the reason if a probe was not made."""
    if value is None:
        raise NotApplicable(seen.facts.probed.unseen or "a batch of one sequence does not show it")


@rule(
    "looks-ahead",
    "model",
    why="A model that sees the token it must predict reaches a loss near 0 and writes nonsense.",
    mend="Give attention a causal mask (is_causal=True), shift convolutions, and do not pool over the sequence.",
    source="x-transformers, RWKV and others: token shift in the wrong direction",
)
def causal(seen: Seen) -> None:
    """No logit depends on a later token."""
    place = seen.facts.probed.looks_ahead
    probed(seen, place)
    if place is None or place < 0:
        return
    following = predicts_next(seen.facts)
    if following is False:
        raise NotApplicable(
            "logits depend on later tokens, and the targets are not the next tokens of the ids that the model gets: "
            "it fills gaps, translates or removes noise, and may look ahead"
        )
    raise (Violation if following else Doubt)(
        "logits of the first half stay as they are if only the second half of the tokens changes",
        f"they change from position {place} on"
        + ("" if following else "; it was not seen whether the targets are the next tokens"),
    )


def predicts_next(facts: Facts) -> bool | None:
    """Return True if targets of training are the next tokens of their ids, False if they are not, None if unseen."""
    try:
        found = [share for ids, targets in paired(facts) if (share := agreement(ids, targets, 1)) is not None]
    except NotApplicable:
        found = []
    if not found:
        return None
    return max(found) > ALIEN


@rule(
    "rows-mix",
    "model",
    why="Sequences of a batch that see each other leak: usually a wrong reshape or transpose, or a batch norm.",
    mend="Check the order of dimensions in every view, reshape and transpose; use LayerNorm or RMSNorm.",
    source="Karpathy: backprop to chart dependencies",
)
def rows_apart(seen: Seen) -> None:
    """The logits of a sequence do not depend on the other sequences of the batch."""
    mixes = seen.facts.probed.rows_mix
    probed(seen, mixes)
    if mixes:
        raise Violation("logits of one sequence alone", "they change when another sequence of the batch does")


@rule(
    "context-unused",
    "model",
    why="A model whose logits do not depend on the tokens before learns which token is frequent, and no more.",
    mend="Follow the attention's output: is it added to the residual stream, and is the mask the right way round?",
    source="x-transformers: attention switched off",
    advice=True,
)
def uses_context(seen: Seen) -> None:
    """A logit depends on the tokens before it."""
    used = seen.facts.probed.uses_context
    probed(seen, used)
    if not used:
        raise Violation("logits that move with the tokens before", "no logit moves when the first half of them changes")


@rule(
    "phases-repeat",
    "model",
    why="Positions in 16 bits collide from 256 on: tokens far back cannot be told apart, and long contexts fail.",
    mend="Compute positions, frequencies and their products in float32, and convert cosines and sines at the end.",
    source="transformers#25681, gpt-neox#1003",
)
def phases_differ(seen: Seen) -> None:
    """Each position has a rotary phase of its own."""
    phases = seen.facts.noticed.phases
    if not phases:
        raise NotApplicable("the model has no buffer with rotary phases")
    for name, repeated in phases.items():
        if repeated:
            words = f"{repeated} positions of {name} have those of the one before"
            raise Violation("other phases at each position", words)
