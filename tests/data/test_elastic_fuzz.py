"""The contract of the order on ten thousand drawn data sets, mixtures and clusters: every row once an epoch, any division of a run the same."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.data.loader import share
from shards.mixture import MixedOrder, Phase
from shards.order import GlobalOrder

EXAMPLES = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
RAGGED = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)


@st.composite
def orders(draw, rows=RAGGED):
    """A data set of ragged shards in small lanes and blocks, as a large one has large ones."""
    return GlobalOrder(draw(rows), draw(st.integers(0, 2**64)), lanes=draw(st.integers(1, 40)), block=draw(st.integers(1, 60)), whole=0)


@st.composite
def mixtures(draw):
    sources = [draw(orders(st.lists(st.integers(0, 15), min_size=1, max_size=4).filter(any))) for _ in range(draw(st.integers(1, 4)))]
    weights = st.lists(st.floats(0, 5), min_size=len(sources), max_size=len(sources)).filter(lambda w: sum(w) > 1e-3)
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 400), max_size=3)))]
    return MixedOrder(sources, [Phase(f, tuple(draw(weights))) for f in firsts], draw(st.integers(0, 99)), block=draw(st.integers(4, 64)))


@st.composite
def clusters(draw):
    """A step's division: up to 1,024 ranks, their micro-batch, micro-steps."""
    size = draw(st.one_of(st.integers(1, 16), st.integers(1, 1024)))
    micro = draw(st.integers(1, max(1, 2048 // size)))
    return size, micro, draw(st.integers(1, max(1, min(4, 2048 // (size * micro)))))


@pytest.mark.slow
@EXAMPLES
@given(orders(), st.integers(0, 2**40))
def test_every_row_once_an_epoch(order, epoch):
    first = epoch * order.rows
    epochs, shards, rows = order.locate(np.arange(first, first + 2 * order.rows))
    assert np.array_equal(epochs, np.repeat([epoch, epoch + 1], order.rows))
    for half in (slice(None, order.rows), slice(order.rows, None)):
        places = np.unique(np.stack([shards[half], rows[half]]), axis=1)
        assert places.shape[1] == order.rows
    assert (rows >= 0).all()
    assert (rows < order._rows_s[shards]).all()


@pytest.mark.slow
@EXAMPLES
@given(st.one_of(orders(), mixtures()), st.integers(0, 2**30), st.lists(clusters(), min_size=1, max_size=3))
def test_any_cluster_takes_the_same_samples_also_when_it_changes_in_the_middle(order, start, divisions):
    """Each division is a stretch of the run with another number of ranks, another micro-batch and another batch."""
    for size, micro, accumulation in divisions:
        batch = size * micro * accumulation
        places = order.by_lane(start, batch)
        parts = [share(places, micro, rank, size) for rank in range(size)]
        assert {len(part) for part in parts} == {accumulation}
        assert {len(positions) for part in parts for positions in part} == {micro}
        assert np.array_equal(np.sort(np.concatenate([p for part in parts for p in part])), np.arange(start, start + batch))
        start += batch


@pytest.mark.slow
@EXAMPLES
@given(mixtures(), st.integers(1, 500))
def test_a_mixture_reads_each_source_in_its_own_order(mixed, count):
    sources, within = mixed.sources(np.arange(count))
    _, shards, rows = mixed.locate(np.arange(count))
    first = 0
    for source, order in enumerate(mixed.orders):
        mine = sources == source
        assert np.array_equal(within[mine], np.arange(mine.sum()))
        _, own_shards, own_rows = order.locate(within[mine])
        assert np.array_equal(shards[mine] - first, own_shards)
        assert np.array_equal(rows[mine], own_rows)
        first += order.shards
