"""The data of a recipe: the same sequences however an update is split, and samples that a stack can shuffle."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from conformance import chats
from conformance.recipe import Recipe
from conformance.runs import Runs
from conformance.subjects.reference import Reference
from conformance.suites import everyday, on_two_ranks

SPLIT = Recipe(microbatch_size=1, microbatches=4, updates=3)


@pytest.mark.parametrize("ignored", [False, True])
def test_an_update_has_the_same_sequences_however_it_is_split(ignored: bool) -> None:
    split = replace(SPLIT, ignored_targets=ignored)
    whole, ranks = replace(split, microbatch_size=4, microbatches=1), replace(split, microbatches=2, world_size=2)
    for part in ("batches", "labels"):
        expected = getattr(whole, part)()
        assert [tensor.shape for tensor in expected] == [(4, 17)] * 3
        assert torch.equal(torch.cat(getattr(split, part)()), torch.cat(expected))
        pairs = zip(*(getattr(ranks, part)(rank) for rank in (0, 1)), strict=True)
        assert torch.equal(torch.cat([tensor for step in pairs for tensor in step]), torch.cat(expected))


def test_ignored_targets_are_ragged_and_the_rest_is_as_it_was() -> None:
    recipe = replace(SPLIT, ignored_targets=True)
    ids, labels = torch.cat(recipe.batches()), torch.cat(recipe.labels())
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    counts = kept[:, 1:].sum(dim=1).tolist()
    assert min(counts) >= 1
    assert len(set(counts)) > 3
    assert torch.equal(torch.cat(SPLIT.labels()), torch.cat(SPLIT.batches()))


@pytest.mark.parametrize("ignored", [False, True])
def test_the_same_batches_in_every_update(ignored: bool) -> None:
    recipe = Recipe(updates=3, same_batches=True, ignored_targets=ignored)
    for tensors in (recipe.batches(), recipe.labels()):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    assert torch.equal(recipe.batches()[0], Recipe().batches()[0])


def test_the_same_batches_in_every_update_but_the_first() -> None:
    recipe = Recipe(updates=4, same_batches="but the first", ignored_targets=True)
    for tensors, plain in ((recipe.batches(), Recipe().batches()), (recipe.labels(), None)):
        first, second, *others = tensors
        assert not torch.equal(first, second)
        assert all(torch.equal(tensor, second) for tensor in others)
        assert plain is None or torch.equal(torch.cat((first, second)), torch.cat(plain))
    counts = [int((rows[:, 1:] != -100).sum()) for rows in recipe.labels()]
    assert counts[0] != counts[1], "the number of targets of the update before must be another one"


def test_validation_data_is_shared_out_and_other_than_training_data() -> None:
    one, two = Recipe(microbatch_size=4), Recipe(microbatch_size=2, world_size=2)
    shares = [two.validation_batches(rank) for rank in (0, 1)]
    assert [tensor.shape for share in shares for tensor in share] == [(2, 17)] * 4
    mixed = torch.cat([tensor for step in zip(*shares, strict=True) for tensor in step])
    assert torch.equal(mixed, torch.cat(one.validation_batches()))
    assert not (mixed[:, None] == torch.cat(one.batches())[None]).all(dim=-1).any()


def test_a_data_set_is_its_document_in_samples_that_overlap_by_one() -> None:
    recipe = Recipe(samples=8, vocab_size=70_000)
    document, samples = recipe.document(), recipe.dataset()
    assert (document.shape, samples.shape, document.dtype) == ((128,), (8, 17), torch.int64)
    assert torch.equal(samples[:, :-1].flatten(), document)
    assert torch.equal(samples[1:, 0], samples[:-1, -1])
    assert (int(samples[-1, -1]), int(document.max()) < 69_999) == (69_999, True)
    assert int(document.max()) > 65_535


def test_marked_targets_come_in_stretches_and_the_rest_is_as_it_was() -> None:
    recipe = Recipe(samples=8, masked_samples=True)
    samples, labels = recipe.dataset(), recipe.dataset_labels()
    kept = labels != -100
    assert torch.equal(labels[kept], samples[kept])
    assert torch.equal(labels[1:, 0], labels[:-1, -1])  # a token is marked alike in both samples that hold it
    assert bool(kept[:, 1:].any(dim=1).all())
    assert not bool(kept.all(dim=1).any())
    assert bool(kept[-1, -1])
    assert torch.equal(Recipe(samples=8).dataset_labels(), samples)


def test_a_batch_total_decides_how_many_sequences_there_are() -> None:
    recipe = Recipe(microbatch_size=4, batch_total=10)
    assert (recipe.update_size, [len(tensor) for tensor in recipe.batches()]) == (10, [4] * 5)


def test_what_a_stack_lacks_is_not_asked_for() -> None:
    subject = Reference()
    subject.lacks = dict.fromkeys(("microbatches", "schedule", "evaluate-every"), "no such option")
    with Runs(subject) as poor, Runs(Reference()) as rich:
        recipe, full = everyday(poor), everyday(rich)
    assert recipe == Recipe(microbatch_size=4, updates=6, optimizer=recipe.optimizer, evaluate=True)
    assert on_two_ranks(recipe) == replace(recipe, microbatch_size=2, world_size=2)
    assert on_two_ranks(full) == replace(full, microbatches=2, world_size=2)
    assert (full.update_size, recipe.update_size) == (4, 4)


def test_altered_tokens_are_those_that_are_named_and_no_others() -> None:
    plain = torch.stack(Recipe().batches())  # (updates, B, T + 1)
    places = {
        "later tokens": (slice(None), slice(None), slice(8, None)),
        "first token": (slice(None), slice(None), slice(0, 1)),
        "other sequences": (slice(None), slice(1, None, 2)),
    }
    for name, place in places.items():
        expected = torch.zeros_like(plain, dtype=torch.bool)
        expected[place] = True
        altered = torch.stack(Recipe(altered=name).batches())  # type: ignore[arg-type] # a name of the Literal
        assert torch.equal(altered != plain, expected), name
        assert 0 <= int(altered.min()) <= int(altered.max()) < Recipe().vocab_size


def test_half_of_the_validation_sequences_keep_one_target() -> None:
    recipe = Recipe(ignored_validation=True)
    ids, labels = torch.cat(recipe.validation_batches()), torch.cat(recipe.validation_labels())
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    assert kept[:, 1:].sum(dim=1).tolist() == [1, 1, 16, 16]
    assert torch.equal(torch.cat(Recipe().validation_labels()), torch.cat(Recipe().validation_batches()))
    two = replace(recipe, world_size=2)
    assert torch.equal(torch.cat(two.validation_labels(1)), torch.cat(two.validation_batches(1))), "rank 1 has all"


def test_who_speaks_in_a_chat_shows_in_the_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(Recipe(chats=True).write_tokenizer(tmp_path)))
    assert tokenizer.get_vocab_size() == Recipe().vocab_size
    longest = 0
    for conversation in Recipe(chats=True).conversations():
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        for message in conversation:
            ids = tokenizer.encode(message["content"]).ids
            assert ids == [int(word.removeprefix("w")) for word in message["content"].split()]
            assert set(ids) <= set(chats.ASKING if message["role"] == "user" else chats.ANSWERING)
        longest = max(longest, sum(len(message["content"].split()) + 2 for message in conversation))
    assert longest <= 48, "each conversation must fit into the sequences of DATA-14"


def test_there_is_one_validation_batch_more_than_are_to_be_evaluated() -> None:
    assert len(Recipe(evaluate_batches=2).validation_batches()) == 3
    assert len(Recipe(evaluate_batches=2, world_size=2).validation_batches(rank=1)) == 3


def test_a_validation_document_has_a_tail_and_no_three_tokens_twice() -> None:
    recipe = Recipe()
    document = recipe.validation_document().tolist()
    assert len(document) == 8 * recipe.block_size + 5
    assert not {0, recipe.vocab_size - 1} & set(document)
    triples = list(zip(document, document[1:], document[2:], strict=False))
    assert len(set(triples)) == len(triples)


def test_a_loader_gives_the_data_set_in_another_order_each_time() -> None:
    recipe = Recipe(samples=8)
    torch.manual_seed(1)
    first, second = (torch.cat(list(recipe.loader())) for _ in range(2))
    assert not torch.equal(first, second)
    for rows in (first, second):
        assert sorted(rows.tolist()) == sorted(recipe.dataset().tolist())
