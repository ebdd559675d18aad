import math
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError, ShardError
from shards.order import GlobalOrder, _absorb, _permute, _start

RAGGED = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)

VERSION_1 = [(0, 2), (1, 2), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0), (1, 3), (1, 4), (1, 0)]


def _places(order, first, last):
    return list(zip(*(array.tolist() for array in order.locate(np.arange(first, last))), strict=True))


@settings(max_examples=60, deadline=None)
@given(rows=RAGGED, seed=st.integers(-(2**63), 2**64), lanes=st.integers(1, 9), block=st.integers(1, 50), epoch=st.integers(0, 2**40))
def test_each_epoch_holds_every_row_once(rows, seed, lanes, block, epoch):
    order = GlobalOrder(rows, seed, lanes=lanes, block=block, whole=0)
    everything = {(shard, row) for shard, count in enumerate(rows) for row in range(count)}
    first = epoch * order.rows
    places = _places(order, first, first + 2 * order.rows)
    assert {e for e, _, _ in places} == {epoch, epoch + 1}
    assert Counter(places) == {(e, *place): 1 for e in (epoch, epoch + 1) for place in everything}


@settings(max_examples=25, deadline=None)
@given(rows=RAGGED, lanes=st.integers(1, 9), block=st.integers(1, 50), cuts=st.lists(st.integers(1, 37), min_size=1, max_size=20))
def test_any_split_of_the_positions_gives_the_same_places(rows, lanes, block, cuts):
    order = GlobalOrder(rows, 5, lanes=lanes, block=block, whole=0)
    ends = np.cumsum([0, *cuts]).tolist()
    whole = _places(order, 0, ends[-1])
    assert [place for a, b in pairwise(ends) for place in _places(order, a, b)] == whole
    shuffled = np.random.default_rng(0).permutation(ends[-1])
    found = np.stack(GlobalOrder(rows, 5, lanes=lanes, block=block, whole=0).locate(shuffled), 1)
    assert [tuple(place) for place in found.tolist()] == [whole[i] for i in shuffled]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7])
def test_ranks_share_out_each_global_batch_whatever_their_number(world_size):
    order = GlobalOrder([13, 0, 50, 8, 1], 3, lanes=4, block=8, whole=0)
    batch = 420
    for step in range(4):
        parts = np.array_split(np.arange(step * batch, (step + 1) * batch), world_size)
        together = np.concatenate([np.stack(order.locate(part), 1) for part in parts])
        np.testing.assert_array_equal(together, np.stack(order.locate(np.arange(step * batch, (step + 1) * batch)), 1))


def test_manifest_order_without_shuffle_runs_on_into_the_next_epoch():
    order = GlobalOrder([2, 0, 1], 9, shuffle=False)
    assert _places(order, 0, 5) == [(0, 0, 0), (0, 0, 1), (0, 2, 0), (1, 0, 0), (1, 0, 1)]


def test_epochs_and_seeds_differ():
    orders = [_places(GlobalOrder([30, 30], seed), 0, 60) for seed in (0, 1)]
    assert orders[0] != orders[1]
    order = GlobalOrder([30, 30], 0)
    assert [place[1:] for place in _places(order, 0, 60)] != [place[1:] for place in _places(order, 60, 120)]


def test_the_order_is_the_one_of_version_1():
    # A change here is a change of every run's data order: raise ORDER_VERSION with it.
    order = GlobalOrder([3, 5, 2], 42, lanes=3, block=4, whole=0)
    assert order.lanes == 3
    assert [place[1:] for place in _places(order, 0, 10)] == VERSION_1


def test_positions_up_to_two_to_the_62():
    order = GlobalOrder([1000, 999], 1, lanes=8, block=64, whole=0)
    epochs, shards, rows = order.locate([2**62, 2**62 - 1])
    assert epochs.tolist() == [2**62 // 1999, (2**62 - 1) // 1999]
    assert all(row < (1000, 999)[shard] for shard, row in zip(shards, rows, strict=True))
    assert epochs.dtype == shards.dtype == rows.dtype == np.int64


@pytest.mark.parametrize("size", [2, 3, 5])
def test_small_ranges_reach_all_permutations_equally(size):
    draws = 300 * math.factorial(size)
    keys = _absorb(_start(0, draws, 0), np.arange(draws))
    images = np.stack([_permute(np.full(draws, i), np.full(draws, size), keys) for i in range(size)], 1)
    counts = Counter(map(tuple, images.tolist()))
    freedom = math.factorial(size) - 1
    chi_squared = sum((count - 300) ** 2 / 300 for count in counts.values()) + 300 * (freedom + 1 - len(counts))
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)


def test_a_small_data_set_is_shuffled_as_a_whole():
    order = GlobalOrder([500] * 8, 0)
    assert order.lanes == 1
    _, shards, rows = order.locate(np.arange(8000))
    line = shards * 500 + rows
    assert abs(np.corrcoef(np.arange(4000), line[:4000])[0, 1]) < 0.06
    assert abs(np.corrcoef(line[:3999], line[1:4000])[0, 1]) < 0.06
    assert abs(np.corrcoef(line[:4000], line[4000:])[0, 1]) < 0.06


def test_a_large_data_set_stays_local_to_few_shards_a_lane():
    order = GlobalOrder([10_000] * 10_000, 0)
    assert (order.lanes, order.block) == (1024, 8192)
    assert GlobalOrder([10**7] * 1000).block == 131_072
    positions = (np.arange(200)[:, None] * 1024 + np.arange(4)).ravel()  # four lanes of 200 steps
    _, shards, _ = order.locate(positions)
    assert len(np.unique(shards)) < 50
    _, shards, _ = order.locate(np.arange(1024))
    assert len(np.unique(shards)) > 900


@settings(max_examples=60, deadline=None)
@given(rows=RAGGED, lanes=st.integers(1, 9), first=st.integers(0, 500), count=st.integers(0, 200))
def test_by_lane_is_a_permutation_in_the_order_of_lanes(rows, lanes, first, count):
    order = GlobalOrder(rows, 5, lanes=lanes, block=3, whole=0)
    places = order.by_lane(first, count)
    assert sorted(places.tolist()) == list(range(first, first + count))
    assert (np.diff(order.lane(places)) >= 0).all()
    unshuffled = GlobalOrder(rows, 5, lanes=lanes, block=3, whole=0, shuffle=False)
    assert unshuffled.by_lane(first, count).tolist() == list(range(first, first + count))


def test_parts_by_lane_need_each_shard_on_few_ranks():
    """Sixteen ranks over two hundred steps: by lane each meets a sixteenth of the shards, position by position each meets far more."""
    order = GlobalOrder([1000] * 1000, 0, lanes=16, block=1000, whole=0)
    ranks, batch = 16, 64
    local, spread = set(), set()
    for step in range(200):
        places = order.by_lane(step * batch, batch)
        local.update(order.locate(places[:4])[1].tolist())
        spread.update(order.locate(np.arange(step * batch, step * batch + 4))[1].tolist())
    assert len(local) <= 4
    assert len(spread) >= 4 * len(local)
    assert ranks * 4 == batch


def test_fingerprint_follows_everything_the_order_depends_on():
    def fingerprint(rows=(3, 4), seed=0, **options):
        return GlobalOrder(rows, seed, **options).fingerprint()

    changed = [
        fingerprint(),
        fingerprint((4, 3)),
        fingerprint(seed=1),
        fingerprint(lanes=1, block=2, whole=0),
        fingerprint(lanes=2, block=2, whole=0),
        fingerprint(shuffle=False),
    ]
    assert len(set(changed)) == len(changed)
    assert fingerprint() == fingerprint()


def test_order_is_picklable():
    order = GlobalOrder([5, 6], 2)
    assert _places(pickle.loads(pickle.dumps(order)), 0, 30) == _places(order, 0, 30)


def test_errors():
    with pytest.raises(ShardError, match="holds no rows in its 2 shards"):
        GlobalOrder([0, 0], 0)
    with pytest.raises(ConfigError, match="must be at least 1; got 0 and 5"):
        GlobalOrder([1], 0, lanes=0, block=5, whole=0)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        GlobalOrder([1], 0).locate([-1])
