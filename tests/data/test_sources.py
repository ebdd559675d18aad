import pickle
from collections import Counter

import numpy as np
import pytest

from mmscale.data.dataset import ShardDataset
from mmscale.data.labels import label_counts
from mmscale.data.loader import StepLoader
from mmscale.data.sources import describe_sources, open_training_data, source_weights
from mmscale.data_config import SourceConfig
from shards.errors import ConfigError, ShardError
from tests.data.tiny import SIZE, collator, config, paired, write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("sources")
    return [write(place / "a"), write(place / "b", rows=(5,)), write(place / "c", rows=(2, 2))]


def opened(folders, data=None, *, weights=(3, 1, 1), **train):
    shards = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=True)]
    stage = config(folders[0], data={"shards": shards} | (data or {}), train=train, model={"image_size": SIZE})
    return open_training_data(stage)


def test_a_mixture_reads_each_source_in_its_own_order_with_its_name_before_the_keys(folders):
    dataset = opened(folders)
    alone = [open_training_data(config(folder, model={"image_size": SIZE})) for folder in folders]
    examples = [dataset[position] for position in range(200)]
    for name, single in zip("abc", alone, strict=True):
        own = [e for e in examples if e.key.startswith(f"{name}/")]
        assert [e.key for e in own] == [f"{name}/{single[i].key}" for i in range(len(own))]
        assert all(np.array_equal(e.image, single[i].image) for i, e in enumerate(own))
    assert Counter(e.key[0] for e in examples)["a"] > 80
    assert len(dataset) == 31 + 5 + 4
    assert dataset.reader.key(3, 2) == "b/s2"
    again = pickle.loads(pickle.dumps(dataset))
    assert [again[i].key for i in range(9)] == [e.key for e in examples[:9]]
    assert again.digest == dataset.digest != opened(folders[::-1]).digest


def test_weights_may_change_at_a_step_and_only_from_there_on(folders):
    before = opened(folders, global_batch=50)
    after = opened(folders, {"weights_from": {2: [0, 0, 1]}}, global_batch=50)
    keys = [[d[i].key for i in range(150)] for d in (before, after)]
    assert keys[0][:100] == keys[1][:100]
    assert {key[0] for key in keys[1][100:]} == {"c"}
    assert before.order.fingerprint(100) == after.order.fingerprint(100)
    assert before.order.fingerprint(101) != after.order.fingerprint(101)


def test_what_a_run_sees_of_each_source_is_described(folders):
    assert describe_sources(opened(folders, weights=(2, 1, 1)), 65536) == [
        "source      a: 31 samples, 32,768 seen (50.0% of the run), 1057.03 epochs",
        "source      b: 5 samples, 16,384 seen (25.0% of the run), 3276.80 epochs",
        "source      c: 4 samples, 16,384 seen (25.0% of the run), 4096.00 epochs",
    ]
    assert describe_sources(open_training_data(config(folders[0])), 10) == []


def test_sources_are_weighed():
    def weighed(*sources, temperature=1.0):
        return source_weights([SourceConfig(path="p", **s) for s in sources], [100, 400], temperature)

    assert weighed({"weight": 3}, {"weight": 1}) == (3, 1)
    assert weighed({"epochs": 2}, {"epochs": 0.5}) == (200, 200)
    assert weighed({}, {}) == (100, 400)
    assert weighed({}, {}, temperature=2.0) == (10, 20)
    with pytest.raises(ConfigError, match="`data.temperature` must be above 0; got 0"):
        weighed({}, {}, temperature=0)
    with pytest.raises(ConfigError, match="weight and epochs of 'p' must be at least 0"):
        weighed({"weight": -1}, {"weight": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shards": []}, "`data.shards` is an empty list"),
        ({"shards": [7]}, r"`data.shards\[0\]` must be a folder or a mapping"),
        ({"shards": [{"path": "x", "wieght": 1}]}, r"(?s)wieght.*data\.shards\[0\]"),
        ({"shards": [{"weight": 1}]}, "`path` is required"),
        ({"shards": ["x/a", "y/a"]}, "the sources' names must differ; got a, a"),
        ({"shards": [{"path": "a", "weight": 1}, {"path": "b"}]}, "either all sources have `weight` or none"),
        ({"shards": [{"path": "a", "weight": 1, "epochs": 1}]}, "either `weight` or `epochs`"),
        ({"weights_from": {3: [1]}}, "need a mixture"),
        ({"temperature": 2.0}, "need a mixture"),
    ],
)
def test_mixtures_that_cannot_be(folders, data, message):
    with pytest.raises(ConfigError, match=message):
        open_training_data(config(folders[0], data=data))


def test_weights_of_later_steps_must_fit_the_sources(folders):
    with pytest.raises(ConfigError, match=r"mixture of 3 sources needs 3 weights; got \[1.0\]"):
        opened(folders, {"weights_from": {5: [1.0]}})
    with pytest.raises(ConfigError, match="a step must be at least 0; got -1"):
        opened(folders, {"weights_from": {-1: [1, 1, 1]}})
    with pytest.raises(ShardError, match="There is no data set folder"):
        opened([*folders[:2], folders[0] / "nowhere"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_is_the_same_samples_for_any_ranks_and_local_to_lanes(folders, size):
    """A large data set in small: with lanes, a rank's share of a step is a contiguous part of it in the order of the lanes."""
    dataset = opened(folders, {"order": {"lanes": 4, "block": 4}})
    for order in dataset.order.orders:
        assert order.lanes == 1  # these are small
    made = collator(folders[0].parent, folders[0])
    loaders = [StepLoader(dataset, made, global_batch=12, micro_batch=2, rank=r, size=size, steps=9) for r in range(size)]
    for start in (0, 12, 24, 41):
        shares = [positions for loader in loaders for positions in loader.positions(start)]
        assert sorted(p for share in shares for p in share) == list(range(start, start + 12))
    together = [p for a in range(12 // (2 * size)) for loader in loaders for p in loader.positions(12)[a]]
    assert together == dataset.order.by_lane(12, 12).tolist()


def test_groups_keep_positions_together(folders):
    made = collator(folders[0].parent, folders[0])
    loader = StepLoader(opened(folders), made, global_batch=12, micro_batch=4, rank=1, size=3, steps=9, consecutive=True)
    assert [list(positions) for positions in loader.positions(24)] == [[28, 29, 30, 31]]


def test_a_json_that_cannot_be_read_hides_no_label(tmp_path):
    """The loader will quarantine that sample by its name."""

    def make(index):
        return paired(index) | {"json": b"{" if index == 1 else b'{"kind": "red"}'}

    assert label_counts(ShardDataset(write(tmp_path / "d", make, (3,))).reader, "kind") == {"red": 2}
