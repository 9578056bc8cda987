"""The order of the sequences in token files, and the batches: nothing lost, nothing twice, on any rank."""

import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from reference.data.tokens import shuffled
from reference.errors import ConfigurationError, DataError
from tests.reference.token_files import END, counting, opened, taken, windows, write
from tests.sentences import sentence_of

# The order


COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 97, 100, 127, 128, 129, 1000, 4099, 65537]


@pytest.mark.parametrize("count", COUNTS)
def test_the_order_is_a_permutation(count: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (-5, 3), (2**70, 10**12)):
        assert np.array_equal(np.sort(shuffled(np.arange(count), count, seed, epoch)), np.arange(count))


def test_a_place_does_not_depend_on_which_others_are_asked_for() -> None:
    whole = shuffled(np.arange(1009), 1009, 3, 4)
    some = np.array([1008, 0, 500, 500, 7])
    assert np.array_equal(shuffled(some, 1009, 3, 4), whole[some])
    far = shuffled(np.array([0, 10**15 - 1]), 10**15, 3, 4)
    assert ((far >= 0) & (far < 10**15)).all()


def test_the_order_stays_what_it_is() -> None:
    # A resumed run must see the order of the first: these figures may not change with numpy, Python or machine.
    assert shuffled(np.arange(10), 10, 1337, 0).tolist() == [0, 5, 8, 7, 3, 9, 2, 1, 4, 6]
    assert shuffled(np.array([0, 1, 2]), 10**9 + 7, 1337, 1).tolist() == [351102804, 401024978, 284382658]


def test_every_order_is_equally_likely() -> None:
    for count in (2, 3, 4):
        orders = math.factorial(count)
        seen: dict[tuple[int, ...], int] = {}
        for epoch in range(40 * orders):
            order = tuple(shuffled(np.arange(count), count, 0, epoch).tolist())
            seen[order] = seen.get(order, 0) + 1
        squares = sum((number - 40) ** 2 / 40 for number in seen.values()) + 40 * (orders - len(seen))
        # Chi-square with orders - 1 degrees of freedom: mean that, variance twice that. 4 deviations above it.
        assert squares < orders - 1 + 4 * math.sqrt(2 * (orders - 1))


@pytest.mark.parametrize("epoch", range(4))
def test_neighbours_are_not_kept_together_and_places_are_evenly_filled(epoch: int) -> None:
    count = 40_009
    order = shuffled(np.arange(count), count, 11, epoch)
    other = shuffled(np.arange(count), count, 11, epoch + 1)
    reseeded = shuffled(np.arange(count), count, 12, epoch)
    # Each of these is within 4 standard deviations of a random order. The neighbours are off by 970 deviations with 2
    # rounds instead of 64, by 240 with 4, by 10 with 8, and by less than 1 from 12 rounds on.
    near = int((np.abs(np.diff(order)) <= 50).sum())
    assert abs(near - 100) < 4 * math.sqrt(100)  # Poisson of mean 2 * 50
    for first, second in ((order, np.arange(count)), (order, other), (order, reseeded), (order[1:], order[:-1])):
        assert abs(np.corrcoef(first, second)[0, 1]) * math.sqrt(count) < 4
        assert (first == second).sum() < 8  # Poisson of mean 1: 8 and more in 1e-5 of all cases
    cells, _, _ = np.histogram2d(np.arange(count), order, bins=20)
    squares = ((cells - count / 400) ** 2).sum() / (count / 400)
    assert abs(squares - 361) < 4 * math.sqrt(2 * 361)


# The batches


def test_an_epoch_gives_every_sequence_once_and_overlapping_by_one(tmp_path: Path) -> None:
    data = opened(counting(tmp_path, 4 * 12 + 1 + 3))
    assert (data.sequences, data.unused) == (12, 3)
    batches = taken(data, 12)
    rows = torch.cat(batches)
    assert all(batch.shape == (2, 5) and batch.dtype == torch.int64 for batch in batches)
    assert torch.equal(rows, rows[:, :1] + torch.arange(5))
    for epoch in (rows[:12], rows[12:]):
        assert sorted(epoch[:, 1:].flatten().tolist()) == list(range(1, 49))  # every target once
    first, second = windows(batches[:6], 4), windows(batches[6:], 4)
    assert first != second
    assert first != list(range(12))
    assert windows(taken(opened(tmp_path, seed=2), 6), 4) != first
    assert windows(taken(opened(tmp_path, seed=1), 6), 4) == first


@pytest.mark.parametrize(("sequences", "size"), [(12, 5), (3, 8), (1, 4), (2100, 7)])
def test_nothing_is_dropped_where_an_epoch_ends(tmp_path: Path, sequences: int, size: int) -> None:
    data = opened(counting(tmp_path, sequences + 1), block_size=1, microbatch_size=size)
    number = -(-3 * sequences // size)
    seen = windows(taken(data, number), 1)
    for epoch in range(3):
        assert sorted(seen[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))


@pytest.mark.parametrize("start", [0, 1, 5, 40, 999])
def test_a_start_in_the_middle_goes_on_as_if_from_the_beginning(tmp_path: Path, start: int) -> None:
    data = opened(counting(tmp_path, 98), block_size=2, microbatch_size=3)
    assert all(map(torch.equal, taken(data, 20, start), taken(data, start + 20)[start:]))
    assert taken(data, 1, 10**15)[0].shape == (3, 3)


def test_ranks_share_no_sequence_and_together_have_those_of_one(tmp_path: Path) -> None:
    data = opened(counting(tmp_path, 121), block_size=1, microbatch_size=2)
    alone = taken(data, 120)
    for world_size in (2, 3, 4):
        ranks = [taken(data, 120 // world_size, 0, rank, world_size) for rank in range(world_size)]
        for update in range(120 // world_size):
            together = windows([batches[update] for batches in ranks], 1)
            assert together == windows(alone[update * world_size : (update + 1) * world_size], 1)
        epoch = [windows(batches[: 60 // world_size], 1) for batches in ranks]
        assert sorted(itertools.chain(*epoch)) == list(range(120))


def test_resumed_on_another_number_of_ranks_the_run_goes_on(tmp_path: Path) -> None:
    data = opened(counting(tmp_path, 98), block_size=1, microbatch_size=2)
    first = [window for rank in (0, 1) for window in windows(taken(data, 6, 0, rank, 2), 1)]  # 12 microbatches
    rest = windows(taken(data, 40, 12), 1)  # on one rank, from number 12
    assert sorted(first + rest[: 97 - len(first)]) == list(range(97))


def test_batches_are_the_callers_own(tmp_path: Path) -> None:
    data = opened(counting(tmp_path, 50))
    before = [batch.clone() for batch in taken(data, 6)]
    for batch in taken(data, 6):
        batch.zero_()
    assert all(map(torch.equal, taken(data, 6), before))


def test_too_little_text_for_one_sequence_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]])
    data = opened(tmp_path, block_size=4)
    assert "4 tokens, but a sequence needs 5" in sentence_of(DataError, lambda: data.batches_from(0))
    assert len(list(data.once())) == 1
    assert taken(opened(tmp_path, block_size=3, microbatch_size=1), 1)[0].tolist() == [[1, 2, 3, END]]


def test_what_is_not_trained_on_is_said(tmp_path: Path) -> None:
    said = opened(counting(tmp_path, 52)).describe()
    assert said.startswith("train: 52 tokens of 1 document in")
    assert "12 sequences of 4 per epoch; the last 3 tokens do not fill one" in said
    assert "\n" not in said


@pytest.mark.parametrize(("start", "rank", "world_size"), [(-1, 0, 1), (0, 1, 1), (0, -1, 1), (0, 2, 2), (0, 0, 0)])
def test_starts_and_ranks_that_are_none(tmp_path: Path, start: int, rank: int, world_size: int) -> None:
    data = opened(counting(tmp_path, 50))
    sentence_of(ConfigurationError, lambda: data.batches_from(start, rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 50, 52])
def test_once_gives_every_target_once_on_ranks_of_equal_length(tmp_path: Path, tokens: int, world_size: int) -> None:
    data = opened(counting(tmp_path, tokens), microbatch_size=3)
    ranks = [list(data.once(rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen: list[int] = []
    for ids, targets in itertools.chain(*ranks):
        assert ids.shape == targets.shape == (3, 4)
        assert ids.dtype == targets.dtype == torch.int64
        counted = targets != -100
        assert torch.equal(ids[counted] + 1, targets[counted])
        seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, tokens))


def test_once_is_the_same_every_time_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    data = opened(counting(tmp_path, 52))
    first, second = (torch.cat([targets for _, targets in data.once()]) for _ in range(2))
    assert torch.equal(first, second)
    assert first[first != -100].tolist() == list(range(1, 52))


def test_once_needs_two_tokens(tmp_path: Path) -> None:
    write(tmp_path, [[]])
    assert "single token" in sentence_of(DataError, lambda: opened(tmp_path).once())


def test_another_process_opens_the_file_instead_of_copying_it(tmp_path: Path) -> None:
    write(tmp_path, [np.zeros(100_000, np.int64)])
    data = opened(tmp_path, block_size=100)
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000
    assert all(map(torch.equal, taken(pickle.loads(pickled), 3), taken(data, 3)))
