import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.mixture import BLOCK, MixedOrder, Phase, block_counts
from shards.order import GlobalOrder

SOURCES = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), min_size=1, max_size=4)


@st.composite
def mixtures(draw):
    """A small mixture with up to four phases, and how many positions to look at."""
    rows = draw(SOURCES)
    orders = [GlobalOrder(r, 3, lanes=draw(st.integers(1, 3)), block=draw(st.integers(1, 9)), whole=0) for r in rows]
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 150), max_size=3)))]
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 10))
    phases = [Phase(f, tuple(draw(st.lists(weight, min_size=len(rows), max_size=len(rows)).filter(any)))) for f in firsts]
    return MixedOrder(orders, phases, draw(st.integers(0, 9)), block=draw(st.integers(4, 40))), draw(st.integers(1, 300))


def check_mixture(mixed, count):
    """Each source is read in its own order, nothing left out, nothing twice; blocks hold what the weights say."""
    sources, within = mixed.sources(np.arange(count))
    _, shards, rows = mixed.locate(np.arange(count))
    first = 0
    for source, order in enumerate(mixed.orders):
        own = within[sources == source]
        assert own.tolist() == list(range(len(own)))
        _, own_shards, own_rows = order.locate(own)
        assert (shards[sources == source] - first).tolist() == own_shards.tolist()
        assert rows[sources == source].tolist() == own_rows.tolist()
        first += order.shards
    assert mixed.consumed(count).tolist() == np.bincount(sources, minlength=len(mixed.orders)).tolist()
    for phase, end in zip(mixed.phases, [*(p.first for p in mixed.phases[1:]), count], strict=True):
        for start in range(phase.first, min(end, count) - mixed.block + 1, mixed.block):
            held = np.bincount(sources[start : start + mixed.block], minlength=len(mixed.orders))
            assert held.tolist() == block_counts(phase.weights, mixed.block).tolist()


@settings(max_examples=150, deadline=None)
@given(mixtures(), st.data())
def test_each_source_is_read_in_its_own_order_exactly_once_an_epoch(drawn, data):
    mixed, count = drawn
    check_mixture(mixed, count)
    some = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    whole = np.stack(mixed.locate(np.arange(count)), 1)
    assert np.stack(pickle.loads(pickle.dumps(mixed)).locate(some), 1).tolist() == whole[some].tolist()
    first = data.draw(st.integers(0, count))
    assert sorted(mixed.by_lane(first, 25).tolist()) == list(range(first, first + 25))


@settings(max_examples=60, deadline=None)
@given(mixtures())
def test_what_was_read_does_not_depend_on_later_weights(drawn):
    mixed, count = drawn
    now = mixed.phases[-1].first + 7
    changed = MixedOrder(mixed.orders, [*mixed.phases, Phase(now, tuple(1.0 for _ in mixed.orders))], mixed.seed, block=mixed.block)
    before = min(now, count)
    assert np.array_equal(np.stack(mixed.locate(np.arange(before))), np.stack(changed.locate(np.arange(before))))
    assert mixed.fingerprint(now) == changed.fingerprint(now)
    assert mixed.fingerprint(now + 1) != changed.fingerprint(now + 1)
    assert mixed.fingerprint() != changed.fingerprint()
    check_mixture(changed, count + 50)


def test_weights_are_kept_in_every_block_and_nearly_in_every_batch():
    mixed = MixedOrder([GlobalOrder([1000] * n, 0) for n in (4, 50, 3)], [Phase(0, (0.7, 0.2, 0.1))])
    sources, _ = mixed.sources(np.arange(2 * BLOCK))
    assert np.bincount(sources[:BLOCK]).tolist() == np.bincount(sources[BLOCK:]).tolist() == [45875, 13107, 6554]
    batches = np.stack([np.bincount(batch, minlength=3) for batch in sources.reshape(-1, 1024)])
    assert np.abs(batches - [716.8, 204.8, 102.4]).max() < 5 * math.sqrt(1024 * 0.25)
    assert not np.array_equal(sources[:BLOCK], sources[BLOCK:])


@pytest.mark.parametrize(
    ("weights", "counts"),
    [((1, 1, 1), [3, 4, 3]), ((1, 0, 1), [5, 0, 5]), ((1e9, 1, 1), [8, 1, 1]), ((0.05, 0.95), [1, 9]), ((3,), [10])],
)
def test_every_weight_above_0_has_a_place_in_a_block(weights, counts):
    assert sorted(block_counts(weights, 10).tolist()) == sorted(counts)
    assert block_counts(weights, 10).sum() == 10


def test_a_mixture_of_one_is_that_one():
    order = GlobalOrder([7, 9], 5)
    mixed = MixedOrder([order], [Phase(0, (2.0,))])
    assert np.array_equal(np.stack(mixed.locate(np.arange(50))), np.stack(order.locate(np.arange(50))))


def test_errors():
    order = GlobalOrder([5], 0)
    for firsts in ([], [1], [0, 5, 5]):
        with pytest.raises(ConfigError, match="phases of a mixture must begin at 0 and rise"):
            MixedOrder([order], [Phase(f, (1.0,)) for f in firsts])
    with pytest.raises(ConfigError, match=r"mixture of 2 sources needs 2 weights; got \[1.0\]"):
        MixedOrder([order, order], [Phase(0, (1.0,))])
    for weights in ((0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match="at least 0 and not all 0"):
            MixedOrder([order, order], [Phase(0, weights)])
    with pytest.raises(ConfigError, match="at most 1 sources; got 2"):
        MixedOrder([order, order], [Phase(0, (1.0, 1.0))], block=1)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        MixedOrder([order], [Phase(0, (1.0,))]).locate([-1])
