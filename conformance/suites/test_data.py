"""DATA: every sample is seen as often as declared, as it is, and its next tokens are what is predicted."""

from dataclasses import replace

import torch
from torch import Tensor

from conformance.checks.data import (
    IGNORED,
    counts_declared_targets,
    divided_by_counts,
    leftovers_as_declared,
    once_each,
    predicts_next,
    sample_numbers,
    targets_are_next,
)
from conformance.clause import clause
from conformance.errors import AdapterFailed, NotApplicable, Violation
from conformance.recipe import Recipe
from conformance.recording.trace import Forward, Trace
from conformance.runs import Runs
from conformance.suites import (
    by_update,
    cross_entropies,
    everyday,
    odd_epochs,
    shapes,
    shuffled,
    shuffled_on_two_ranks,
    stays_inside,
)

EPOCHS = 2  # of shuffled()


def order(run: Trace, samples: torch.Tensor) -> list[int | None]:
    """Return the numbers of the samples in the order in which they are trained on."""
    return [number for forward in run.training_forwards() for number in sample_numbers(forward.ids, samples)]


@clause(
    "DATA-1",
    since="0.1",
    needs=("sampler",),
    why="Some samples are seen twice and some never, and nothing in the loss shows it.",
    mend="Draw without replacement, and go on to the next epoch where this one ends.",
    source="huggingface/datasets#3423, huggingface/nanoVLM#203 (each sample once per worker)",
    bound="exactly once",
)
def test_each_sample_once(runs: Runs) -> None:
    """In each epoch the run sees every sample exactly once."""
    recipe = shuffled()
    assert recipe.samples is not None
    seen = order(runs.trace(recipe), recipe.dataset())
    for epoch in range(EPOCHS):
        part = seen[epoch * recipe.samples : (epoch + 1) * recipe.samples]
        once_each(part, recipe.samples, f"epoch {epoch + 1}")


@clause(
    "DATA-2",
    since="0.1",
    needs=("sampler",),
    why="If epochs repeat their order, the gradients of one epoch repeat those of the last.",
    mend="Tell the sampler the epoch (DistributedSampler.set_epoch), and let it shuffle by epoch.",
    source="pytorch#31771, #11324, lucidrains/DALLE-pytorch#230",
    bound="another order (in a healthy run, two of three are the same by chance once in 13440)",
)
def test_epochs_differ(runs: Runs) -> None:
    """Every epoch is shuffled, and no two epochs have the same order."""
    recipe, epochs = shuffled(), EPOCHS
    if runs.asks("0.2"):  # a stack may shuffle anew once, and then repeat that order
        recipe, epochs = replace(recipe, updates=12, save_every=None), 3
    assert recipe.samples is not None
    seen = order(runs.trace(recipe), recipe.dataset())
    found = [seen[epoch * recipe.samples : (epoch + 1) * recipe.samples] for epoch in range(epochs)]
    for number, one in enumerate(found, start=1):
        if one == sorted(one, key=str):
            raise Violation("every epoch in a random order", f"epoch {number} in the order of the data: {one}")
        if one in found[: number - 1]:
            earlier = found.index(one) + 1
            raise Violation(
                f"{epochs} epochs in {epochs} different random orders",
                f"epoch {number} has the order of epoch {earlier}: {one}",
            )


@clause(
    "DATA-3",
    since="0.1",
    needs=("seed", "sampler"),
    why="A run that cannot be repeated cannot be debugged, and one order under all seeds hides the effect of order.",
    mend="Pass the configured seed to the sampler.",
    source="Lightning-AI/litgpt#1425",
    bound="the order itself",
)
def test_seed_decides_the_order(runs: Runs) -> None:
    """The same seed gives the same order of samples, and another seed gives another order."""
    recipe = shuffled()
    samples, quiet = recipe.dataset(), replace(recipe, save_every=None)
    first, again, other = (
        order(runs.trace(changed), samples) for changed in (recipe, replace(quiet, repeat=1), replace(quiet, seed=2))
    )
    if first != again:
        raise Violation("the same order in two runs with the same seed", f"{first}, then {again}")
    if first == other:
        raise Violation("another order under another seed", f"the same order under both: {first}")


@clause(
    "DATA-4",
    since="0.1",
    needs=("sampler", "two-ranks"),
    why="Two ranks on the same samples train as one does, at twice the cost.",
    mend="Give each rank its share of one common order: the same seed on every rank, a different offset on each.",
    source="TinyLlama#67, #69, NVlabs/LongLive#71, QwenLM/Qwen3-VL#1971",
    bound="exactly once",
)
def test_ranks_share_the_epoch(runs: Runs) -> None:
    """Two ranks see different samples, and together they see every sample of the epoch once."""
    recipe = shuffled_on_two_ranks()
    assert recipe.samples is not None
    samples = recipe.dataset()
    first, second = (order(run, samples) for run in runs.ranks(recipe))
    share = recipe.samples // recipe.world_size
    for epoch in range(EPOCHS):
        part = slice(epoch * share, (epoch + 1) * share)
        once_each([*first[part], *second[part]], recipe.samples, f"epoch {epoch + 1}, both ranks together")


@clause(
    "DATA-5",
    since="0.1",
    why="Ids that wrap around at 65536 become other valid tokens, and the model learns garbage.",
    mend="Choose the integer type of token files by the size of the vocabulary.",
    source="huggingface/datatrove#118, allenai/open-instruct#1862, nanoGPT (memmap of uint16)",
    bound="the ids themselves",
)
def test_large_ids_arrive(runs: Runs) -> None:
    """Token ids above 65535 reach the model unchanged."""
    step = replace(everyday(runs).optimizer, arguments=(("lr", 1e-3),))
    (recipe, *_) = shapes(runs, Recipe(vocab_size=70_000, n_layer=1, n_embd=16, updates=1, optimizer=step))
    if runs.has("sampler"):
        recipe = replace(recipe, samples=2)
    samples = torch.cat(recipe.batches()) if recipe.samples is None else recipe.dataset()
    run = runs.trace(recipe)
    if None in order(run, samples):
        found = max(int(forward.ids.max()) for forward in run.training_forwards())
        raise Violation(
            f"the sequences of the recipe, with ids up to {int(samples.max())}",
            f"other sequences, with ids up to {found}",
        )


@clause(
    "DATA-6",
    since="0.1",
    why="A model that is shown the token to predict learns to copy, and one with shifted targets learns the token "
    "after the next; the loss falls in both cases.",
    mend="Shift targets against ids exactly once, either in the data or in the model.",
    source="huggingface/transformers#27517, Project-MONAI/GenerativeModels#314; #23530 (no end is ever learnt)",
    bound="a spread of 1e-4 in loss / cross entropy over four updates, and over two epochs (healthy: 3e-7; "
    "another shift: 3.9e-3; ends of documents left out: 8.3e-3)",
)
def test_targets_are_the_next_tokens(runs: Runs) -> None:
    """The target of each position is the next token of the same sequence, including the end of a document."""
    # The data set of shuffled() ends with the only token that ends a document.
    for recipe in [Recipe(updates=4), *([shuffled()] if runs.has("sampler") else [])]:
        rows = torch.cat(recipe.batches()) if recipe.samples is None else recipe.dataset()
        run = runs.trace(recipe)
        forwards = run.training_forwards()
        numbers = [sample_numbers(forward.ids, rows) for forward in forwards]
        losses = cross_entropies(runs, recipe, run)
        if not forwards or len(forwards) != len(losses) or any(None in found for found in numbers):
            raise NotApplicable("losses and sequences cannot be paired: see ACC-6")
        tokens = [torch.stack([rows[number] for number in found if number is not None]) for found in numbers]
        entropies = [entropy for entropy in run.entropies if entropy.grad_enabled]
        if stays_inside(forwards, entropies):
            targets_are_next([entropy.labels for entropy in entropies], tokens)
            continue
        predicts_next([f.scores for f in forwards], tokens, [loss.item() for loss in losses])


@clause(
    "DATA-7",
    since="0.2",
    needs=("sampler",),
    why="If an epoch ends in the middle of a batch, samples may be lost or seen twice, the same ones in every epoch or "
    "others by chance.",
    mend="Decide what happens to the samples that fill no batch, and declare it: fill the batch from the next epoch, "
    "make a smaller batch, or leave them out.",
    source="huggingface/accelerate#2316, torch.utils.data.DataLoader (drop_last), DistributedSampler (repeats)",
    bound="number of times that each sample is seen",
)
def test_samples_left_over(runs: Runs) -> None:
    """At the end of an epoch, the stack treats the samples that fill no batch as the policy declares."""
    recipe = odd_epochs()
    word = runs.policy.leftovers(recipe, "epoch")
    require_in_epoch(word)
    assert recipe.samples is not None
    leftovers_as_declared(by_update(runs.trace(recipe), recipe.dataset()), recipe.samples, 2, word, "samples")


def require_in_epoch(word: str) -> None:
    """Raise AdapterFailed for a word that says nothing about an epoch."""
    if word == "weighed":
        raise AdapterFailed(
            "policy.leftovers() returned 'weighed': of an epoch choose carried, short, dropped, repeated"
        )


@clause(
    "DATA-8",
    since="0.2",
    needs=("sampler", "microbatches"),
    why="Either an update of a few microbatches at the end of every epoch weighs as much as a whole one, or those "
    "microbatches are lost.",
    mend="Decide what happens to the microbatches that fill no update, and declare it.",
    source="Lightning and transformers' Trainer step on what is left at the end of an epoch; litgpt finetune drops it",
    bound="number of times that each sample is seen",
)
def test_microbatches_left_over(runs: Runs) -> None:
    """At the end of an epoch, the stack treats the microbatches that fill no update as the policy declares."""
    recipe = Recipe(samples=6, microbatch_size=2, microbatches=2, updates=6)
    word = runs.policy.leftovers(recipe, "window")
    require_in_epoch(word)
    assert recipe.samples is not None
    leftovers_as_declared(by_update(runs.trace(recipe), recipe.dataset()), recipe.samples, 4, word, "microbatches")


@clause(
    "DATA-9",
    since="0.2",
    why="If the stack replaces such an id, or takes it modulo the vocabulary's size, it trains on other words: usually "
    "the text was made with another tokenizer.",
    mend="Compare the largest id with the size of the vocabulary, or let the lookup raise.",
    source="a token file with a flipped bit, or of another tokenizer; JAX clamps such indices, torch's CPU raises",
    bound="an error before the first update",
    last=True,
)
def test_ids_outside_the_vocabulary(runs: Runs) -> None:
    """The stack raises an error for a token id that is outside the vocabulary."""
    runs.trace(Recipe())  # a stack that always raises would raise here too
    tried = runs.attempt(Recipe(altered="unknown token"))
    if tried.error is None:
        raise Violation(
            "an error about the token id 128 in a vocabulary of 128",
            f"{len(tried.trace.updates)} updates, and no error",
        )


def paired_whole(
    runs: Runs, recipe: Recipe, run: Trace, rows: Tensor, wanted: str
) -> tuple[list[Forward], list[Tensor], list[list[int]]]:
    """Return the training forwards, the loss of each, and the numbers of its sequences among the rows (N, T + 1).

    Raises:
        NotApplicable: if they cannot be paired, or are other sequences than those.
        Violation: if a sequence does not go into the model whole; ``wanted`` says what should.
    """
    forwards, losses = run.training_forwards(), cross_entropies(runs, recipe, run)
    if not forwards or len(forwards) != len(losses):
        raise NotApplicable("losses and sequences cannot be paired: see ACC-6")
    short = [forward.ids.shape[1] for forward in forwards if forward.ids.shape[1] < recipe.block_size]
    if short:
        raise Violation(wanted, f"sequences of {short[0]} tokens")
    numbers = [sample_numbers(forward.ids[:, : recipe.block_size], rows) for forward in forwards]
    known = [[number for number in found if number is not None] for found in numbers]
    if known != numbers:
        raise NotApplicable("the stack trains on sequences other than those asked for: see ACC-6")
    return forwards, losses, known


@clause(
    "DATA-10",
    since="0.2",
    why="A stack that cuts sequences, or pads them to a round length, loses targets or trains on padding.",
    mend="Pass the length on unchanged; if you pad, give the padding a target that is ignored.",
    source="Lightning-AI/litgpt (blocks of T + 1 without overlap), padding to multiples of 8 for tensor cores",
    bound="as DATA-6 (healthy: 1e-7; the last target left out: 5e-3)",
)
def test_odd_lengths(runs: Runs) -> None:
    """Sequences of an odd length (13 tokens) go into the model whole, and the model predicts the next token at each of
    their positions.
    """
    recipe = Recipe(block_size=13, updates=4)
    run, rows = runs.trace(recipe), torch.cat(recipe.batches())
    forwards, losses, numbers = paired_whole(runs, recipe, run, rows, "sequences of 13 tokens in the model")
    tokens = [rows[found] for found in numbers]
    entropies = [entropy for entropy in run.entropies if entropy.grad_enabled]
    if stays_inside(forwards, entropies):
        targets_are_next([entropy.labels for entropy in entropies], tokens)
        return
    predicts_next([f.scores for f in forwards], tokens, [loss.item() for loss in losses])


@clause(
    "DATA-11",
    since="0.2",
    needs=("ignored-targets",),
    why="Data with targets of its own, such as chats, often takes another path than plain text. If data and trainer "
    "both shift the targets there, the model learns the token after the next.",
    mend="Shift targets against ids exactly once on every path, either in the data or in the model.",
    source="InternLM/InternLM#318 (the data set shifts the labels, and so does the model)",
    bound="as DATA-6, of the mean or of the sum over the targets (healthy: 3e-7; shifted twice: 1e-2)",
)
def test_given_targets_are_the_next_tokens(runs: Runs) -> None:
    """Where some targets are ignored, the sequences go into the model whole, and every other position still predicts
    its next token.
    """
    recipe = Recipe(updates=4, ignored_targets=True)
    run, rows, labels = runs.trace(recipe), torch.cat(recipe.batches()), torch.cat(recipe.labels())
    wanted = f"sequences of {recipe.block_size} tokens in the model, each with its next token as the target"
    forwards, losses, numbers = paired_whole(runs, recipe, run, rows, wanted)
    targets = [labels[found] for found in numbers]
    entropies = [entropy for entropy in run.entropies if entropy.grad_enabled]
    if stays_inside(forwards, entropies):
        targets_are_next([entropy.labels for entropy in entropies], targets)
        return
    scores, means = [f.scores for f in forwards], [loss.item() for loss in losses]
    counts = [int((found[:, 1:] != IGNORED).sum()) for found in targets]
    try:
        predicts_next(scores, targets, [loss / count for loss, count in zip(means, counts, strict=True)])  # sums
    except Violation:
        if not divided_by_counts(scores, targets, means):
            predicts_next(scores, targets, means)


@clause(
    "DATA-12",
    since="0.2",
    needs=("loader",),
    why="If every pass over the user's loader begins with the same random state, all epochs have the same order.",
    mend="Seed each pass by its number, or not at all. If your stack takes no loader of its user, name loader in "
    "lacks.",
    source="pytorch/pytorch#31771 (the same order in every epoch)",
    bound="as DATA-2 (two of two are the same by chance once in 40320)",
)
def test_order_of_a_loader(runs: Runs) -> None:
    """If the user hands over a DataLoader that shuffles, every epoch sees each sample once, in another order than the
    epochs before.
    """
    recipe = Recipe(samples=8, microbatch_size=2, updates=8, shuffled_by="loader")
    assert recipe.samples is not None
    seen = order(runs.trace(recipe), recipe.dataset())
    first, second = seen[: recipe.samples], seen[recipe.samples :]
    for number, epoch in enumerate((first, second), start=1):
        once_each(epoch, recipe.samples, f"epoch {number}")
    if first == second:
        raise Violation("two epochs in two different random orders", f"the same order in both: {first}")


@clause(
    "DATA-13",
    since="0.2",
    needs=("sampler", "masked-samples"),
    why="A model that also learns the prompts learns to write them. If the mask of the inputs is laid on the targets, "
    "each answer lacks its first token, and the run learns the first token of the next prompt.",
    mend="Shift the mask with the targets: where the next token is marked, there is a target. If your stack takes no "
    "such data set, name masked-samples in lacks.",
    source="karpathy/nanochat#582 (the mask is dropped), pytorch/torchtitan#2755, verl-project/verl#3287 (off by one)",
    bound="as DATA-6 (healthy: 1.2e-7; all tokens: 1.0e-2; the mask of the inputs: 1.3e-2)",
)
def test_marked_targets_of_a_data_set(runs: Runs) -> None:
    """If only some tokens of a data set are marked as targets, those tokens are predicted and no others."""
    recipe = replace(shuffled(), updates=4, save_every=None, masked_samples=True)
    run = runs.trace(recipe)
    runs.require_read(recipe, "dataset_labels", "masked-samples")
    rows, labels = recipe.dataset(), recipe.dataset_labels()
    wanted = f"sequences of {recipe.block_size} tokens in the model, each with its targets"
    forwards, losses, numbers = paired_whole(runs, recipe, run, rows, wanted)
    entropies = [entropy for entropy in run.entropies if entropy.grad_enabled]
    if stays_inside(forwards, entropies):
        targets_are_next([entropy.labels for entropy in entropies], [labels[found] for found in numbers])
        return
    tokens, targets = ([whole[found] for found in numbers] for whole in (rows, labels))
    counts_declared_targets([f.scores for f in forwards], tokens, targets, [loss.item() for loss in losses])
