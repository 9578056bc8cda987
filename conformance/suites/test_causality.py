"""CAUSAL: what a logit may depend on, and what it must."""

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from conformance.checks.causality import earlier_unchanged
from conformance.checks.comparison import largest_difference, same
from conformance.clause import clause
from conformance.errors import NotApplicable, Violation, quoted
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.suites import SHARED, in_shapes, shapes
from conformance.tokens import Alteration

Pair = tuple[Tensor, Tensor, Tensor, Tensor]
"""Token ids (B, T) and logits (B, T, V) of a forward, and those of the same forward of the altered run."""

ORDER_BOUND = 2e-6  # of the root mean square of the logits

NOT_AS_GIVEN = (
    "the stack does not train on the tokens as the recipe gives them, so two runs cannot be compared: see ACC-6"
)


def pairs(runs: Runs, recipe: Recipe, altered: Alteration) -> list[Pair]:
    """Return the training forwards before the first update, of a run and of one on altered tokens.

    Raises:
        NotApplicable: if they cannot be paired.
    """
    first, second = (runs.trace(replace(recipe, altered=a)).training_forwards(update=0) for a in (None, altered))
    found = [(f.ids, f.scores, g.ids, g.scores) for f, g in zip(first, second)]
    if not found or len(first) != len(second) or any(ids.shape != others.shape for ids, _, others, _ in found):
        raise NotApplicable(NOT_AS_GIVEN)
    return found


@clause(
    "CAUSAL-1",
    since="0.1",
    why="A model that sees the token it must predict has a training loss near zero and generates nonsense.",
    mend="Mask the scores of later tokens before the softmax; with a kernel, pass is_causal or the mask.",
    source="huggingface/transformers#48745, paiml/entrenar#310, karpathy/minGPT#75",
    bound="bit equality (healthy: 0; weakest mutant, a mask one token too wide: 1e-2)",
)
def test_no_look_ahead(runs: Runs) -> None:
    """No logit depends on a later token, in sequences of even and of odd length, in a batch of a single sequence, and
    in every precision.
    """
    for recipe in shapes(runs):
        sees_nothing_later(runs, recipe, f"{recipe.shape}, {recipe.block_size} tokens: ")
    for recipe in shapes(runs, Recipe(block_size=13)) if runs.asks("0.2") else []:  # of another kernel, or a padded one
        with contextlib.suppress(NotApplicable):  # a stack may refuse odd lengths by design: DATA-10 says why
            sees_nothing_later(runs, recipe, f"{recipe.shape}, {recipe.block_size} tokens: ")
    for recipe in alone_and_in_16_bits(runs) if runs.asks("0.2") else []:
        with contextlib.suppress(NotApplicable):
            where = f"{recipe.precision}, sequences in a batch: {recipe.microbatch_size}"
            sees_nothing_later(runs, recipe, f"{recipe.shape}, {where}: ")


def alone_and_in_16_bits(runs: Runs) -> list[Recipe]:
    """Return runs for which a stack may take another kernel: a sequence at a time, and each 16-bit precision."""
    alone = shapes(runs, Recipe(microbatch_size=1, updates=1))
    first = shapes(runs)[0]  # attention is the same in both shapes, and so is the kernel
    return alone + [replace(first, precision=name) for name in runs.precisions() if name != "32-true"]


def sees_nothing_later(runs: Runs, recipe: Recipe, where: str) -> None:
    """Check that the logits before the first altered token stay the same."""
    for ids, logits, others, changed in pairs(runs, recipe, "later tokens"):
        until = int((ids == others).all(dim=0).int().argmin())  # the first place where any sequence differs
        if until == 0:
            raise NotApplicable(NOT_AS_GIVEN)
        earlier_unchanged(logits, changed, until, where=where)


@clause(
    "CAUSAL-2",
    since="0.1",
    why="Sequences that see each other train on leaked text, and the model behaves differently alone than in a batch.",
    mend="Look for a view or reshape where a transpose is meant, and for statistics over the batch.",
    source="bigscience-workshop/Megatron-DeepSpeed#335, karpathy.github.io/2019/04/25/recipe, transformers#17455",
    bound="bit equality (healthy: 0; weakest mutant, batch and time exchanged: 2e-2)",
)
def test_sequences_apart(runs: Runs) -> None:
    """The logits of a sequence do not depend on the other sequences in its batch."""
    for recipe in shapes(runs):
        for ids, logits, others, changed in pairs(runs, recipe, "other sequences"):
            kept = (ids == others).all(dim=1)
            if not kept.any() or kept.all():
                raise NotApplicable(NOT_AS_GIVEN)
            if not same(logits[kept], changed[kept]):
                raise Violation(
                    f"{recipe.shape}: logits of a sequence stay the same if another sequence of the batch changes",
                    f"they change by up to {largest_difference(logits[kept], changed[kept])}",
                )


@clause(
    "CAUSAL-3",
    since="0.1",
    why="A model that sees only part of its context still learns, but no more than that part tells it.",
    mend="Check the attention mask: for SDPA, True marks what takes part; elsewhere it may mark what does not. Also "
    "look for a window of zero, or one shorter than the sequence.",
    source="unslothai/unsloth#8253 (a window of zero sees nothing)",
    bound="different bits at every position that sees the first token (healthy: all of them)",
)
def test_whole_context(runs: Runs) -> None:
    """Every logit depends on the first token, unless the stack declares that it does not see that token."""
    for recipe in shapes(runs):
        for ids, logits, others, changed in pairs(runs, recipe, "first token"):
            if torch.equal(ids, others):
                raise NotApplicable(NOT_AS_GIVEN)
            reached = sees_first(ids, runs.policy.context(recipe), runs.policy.document_end(recipe))
            reached &= sees_first(others, None, runs.policy.document_end(recipe))
            same = (logits == changed).all(dim=-1)
            blind, leaking = (
                wrong.any(dim=0).nonzero().flatten().tolist() for wrong in (same & reached, ~same & ~reached)
            )
            if blind:
                raise Violation(
                    f"{recipe.shape}: if the first token changes, so do the logits at all positions that see it",
                    f"they stay the same at {len(blind)} positions: {quoted(blind)}",
                )
            if leaking:
                raise Violation(
                    f"{recipe.shape}: if the first token changes, logits stay the same where the policy says that it "
                    "is not seen",
                    f"they change at {len(leaking)} positions: {quoted(leaking)}",
                )


@clause(
    "CAUSAL-4",
    since="0.2",
    why="A model that knows which tokens came before, but not in which order, is a bag of words with a causal mask.",
    mend="Check that positions reach the attention (rotary) or the embeddings (learned), and that they are not all the "
    "same.",
    source="MakazhanAlpamys/Soup#793, NVIDIA/Megatron-LM#6305 (an option of positions that nobody reads)",
    bound="2e-6 of the logits' size (healthy: 2e-5 and more; without positions: 1e-7)",
)
def test_order_of_the_context(runs: Runs) -> None:
    """The last logit depends on the order of the tokens before it, even in a model with one layer."""
    for recipe in shapes(runs, Recipe(n_layer=1, updates=1)):
        context, end = runs.policy.context(recipe), runs.policy.document_end(recipe)
        if context is not None and context < 3:
            raise NotApplicable(f"the policy declares a context of {context} tokens, which have no order")
        for ids, logits, others, changed in pairs(runs, recipe, "exchanged tokens"):
            last = recipe.block_size - 1
            moved = (ids[:, :last] != others[:, :last]).any(dim=1)
            if end is not None:
                moved &= ~(ids[:, : last + 1] == end).any(dim=1)
            if not moved.any() or not torch.equal(ids[:, last], others[:, last]):
                raise NotApplicable(NOT_AS_GIVEN)
            first, second = logits[moved, last].double(), changed[moved, last].double()
            difference, size = (first - second).abs().max().item(), first.square().mean().sqrt().item()
            if not difference and blind_to_first(runs, recipe, moved):
                raise NotApplicable("the last logit does not depend on the tokens before it: see CAUSAL-3")
            if not difference > ORDER_BOUND * size:
                raise Violation(
                    f"{recipe.shape}, one layer: the last logit moves if the two tokens before it are exchanged",
                    f"it moves by {difference:.2g}, of a size of {size:.2g}: positions reach nothing",
                )


@clause(
    "CAUSAL-5",
    since="0.2",
    needs=("dropout",),
    why="With dropout, attention often takes another path, and the mask can be lost on that path alone: then every run "
    "with dropout trains on the tokens that it must predict.",
    mend="Pass the mask, or is_causal, on every path through the attention, whatever the probability of dropout is.",
    source="keras-team/keras#23038 (the causal mask is dropped where dropout is above 0)",
    bound="bit equality (healthy: 0; weakest mutant, no mask under dropout: 1e-2)",
)
def test_no_look_ahead_with_dropout(runs: Runs) -> None:
    """With dropout on, too, no logit depends on a later token."""
    for recipe in shapes(runs, Recipe(dropout=0.1, updates=1)):
        first, again = (runs.trace(replace(recipe, repeat=n)).training_forwards(0) for n in (0, 1))
        if not all(torch.equal(one.scores, other.scores) for one, other in zip(first, again)):
            raise NotApplicable("two equal runs draw other dropout masks, so their logits cannot be compared")
        sees_nothing_later(runs, recipe, f"{recipe.shape}, dropout 0.1: ")


@clause(
    "CAUSAL-6",
    since="0.2",
    needs=("grouped-query",),
    why="Attention with shared heads of keys and values often takes another path, and the mask can be lost on that "
    "path alone.",
    mend="Pass the mask, or is_causal, on every path through the attention. If your stack has no such heads, name "
    "grouped-query in lacks.",
    source="keras-team/keras#23038 (grouped-query attention has the same defect as dropout)",
    bound="bit equality (healthy: 0; no mask: 1e-2)",
)
def test_no_look_ahead_with_shared_heads(runs: Runs) -> None:
    """If query heads share heads of keys and values, no logit depends on a later token."""
    in_shapes(
        runs,
        replace(SHARED, updates=1),
        lambda recipe: sees_nothing_later(
            runs, recipe, f"{recipe.shape}, two query heads for each head of keys and values: "
        ),
    )


def blind_to_first(runs: Runs, recipe: Recipe, chosen: Tensor) -> bool:
    """Return True if the last logit of each of these sequences stays the same when their first token changes."""
    last = recipe.block_size - 1
    return all(
        torch.equal(logits[chosen, last], changed[chosen, last])
        for _, logits, _, changed in pairs(runs, recipe, "first token")
    )


def sees_first(ids: Tensor, context: int | None, end: int | None) -> Tensor:
    """Return where a logit sees the first token of its sequence, (B, T), bool.

    Args:
        ids: (B, T).
        context: how many tokens back a logit looks, its own included; None: to the first.
        end: id that ends a document, and hides all documents before; None: nothing does.
    """
    reached = torch.ones_like(ids, dtype=torch.bool)
    if context is not None:
        reached[:, context:] = False
    if end is not None:
        before = torch.zeros_like(ids)
        before[:, 1:] = (ids == end)[:, :-1].cumsum(dim=1)
        reached &= before == 0
    return reached
