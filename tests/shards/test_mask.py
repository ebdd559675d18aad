import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.index import adopt, build_manifest, shard_info
from shards.manifest import make_manifest, read_manifest, write_manifest
from shards.mask import kept_rows, narrow, pack, unpack
from shards.read import ShardReader
from shards.report import find, statistics
from shards.verify import verify
from tests.shards.tars import flip_bit, make_data_set, pair, write_tar
from tests.shards.versions import keys, samples


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_a_mask_keeps_just_what_it_was_made_of(flags):
    kept = np.array(flags)
    mask = pack(kept)
    assert unpack(mask, len(flags), "s").tolist() == flags
    assert kept_rows(mask, len(flags), "s").tolist() == [row for row, flag in enumerate(flags) if flag]
    assert (mask is None) == all(flags)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_narrowing_twice_keeps_what_both_keep(flags):
    first = np.array([a for a, _ in flags])
    second = np.array([b for a, b in flags if a], dtype=np.bool_)
    mask = narrow(pack(first), len(flags), "s", second)
    assert unpack(mask, len(flags), "s").tolist() == [a and b for a, b in flags]


def test_a_mask_of_another_tar_is_refused():
    for rows in (3, 20):
        with pytest.raises(ShardError, match=f"The row mask of s.tar was made for another tar than the one with {rows} samples"):
            unpack(pack(np.array([False] * 9 + [True])), rows, "s.tar")


def _masked(folder, number, rows):
    """Keep only some rows of one shard."""
    manifest = read_manifest(folder)
    info = manifest.shards[number]
    kept = np.zeros(info.rows, dtype=np.bool_)
    kept[rows] = True
    infos = list(manifest.shards)
    infos[number] = shard_info(folder / info.shard, mask=pack(kept))
    return write_manifest(folder, infos)


def test_everything_speaks_of_kept_rows(tmp_path):
    folder = make_data_set(tmp_path / "d")
    before = read_manifest(folder).digest
    manifest = _masked(folder, 0, [1, 4])
    assert manifest.digest != before
    reader = ShardReader(folder)
    assert reader.rows_per_shard.tolist() == [2, 3, 4]
    assert len(reader) == manifest.rows == 9
    assert samples(folder) == [pair(number) for number in (1, 4, *range(5, 12))]
    assert reader.index(0)["key"].to_pylist() == ["k0001", "k0004"]
    assert reader.key(0, 1) == "k0004"
    with pytest.raises(IndexError, match=r"no row 2 in s-000\.tar: it has 2"):
        reader[0, 2]
    with pytest.raises(IndexError):
        reader[0, -1]
    assert find(reader, "k0004") == (0, 1)
    assert statistics(folder).rows == len(statistics(folder).widths) == 9
    assert manifest.shards[0].image_count == 2
    assert verify(folder, full=True).checked == 9


def test_what_is_left_out_is_not_verified_and_the_rest_is(tmp_path):
    folder = make_data_set(tmp_path / "d")
    _masked(folder, 0, [0])
    reader = ShardReader(folder)
    reader[0, 0]
    parts = reader.index(0)["parts"][0].as_py()
    flip_bit(folder / "s-000.tar", parts[0]["offset"])
    assert [fault.key for fault in verify(folder, full=True).faults] == [None, "k0000"]


def test_shards_may_lie_in_another_folder_and_move_with_it(tmp_path):
    base = make_data_set(tmp_path / "one" / "base")
    version = tmp_path / "one" / "version"
    version.mkdir()
    write_manifest(version, [shard_info(tar, location="../base") for tar in sorted(base.glob("*.tar"))])
    assert keys(version) == keys(base)
    assert read_manifest(version).digest == read_manifest(base).digest
    (tmp_path / "one").rename(tmp_path / "two")
    assert keys(tmp_path / "two" / "version") == keys(tmp_path / "two" / "base")
    assert verify(tmp_path / "two" / "version", full=True).sound
    shutil.rmtree(tmp_path / "two" / "base")
    with pytest.raises(
        ShardError, match=r"names tars in .*version/\.\./base', such as 's-000\.tar', and there is no such folder.*move both"
    ):
        read_manifest(tmp_path / "two" / "version")


def test_indexing_again_keeps_masks_and_locations(tmp_path):
    folder = make_data_set(tmp_path / "d")
    digest = _masked(folder, 1, [0, 2]).digest
    assert adopt(folder).digest == digest
    write_tar(folder / "t.tar", [pair(77)])
    assert adopt(folder).rows_per_shard.tolist() == [5, 2, 4, 1]
    write_tar(folder / "s-001.tar", [pair(number) for number in (5, 6, 8)])
    with pytest.raises(
        ShardError, match=r"leaves out rows of 's-001\.tar', and that tar was replaced since.*delete manifest\.parquet to take in every"
    ):
        adopt(folder)
    (folder / "manifest.parquet").unlink()
    assert build_manifest(folder).rows_per_shard.tolist() == [5, 3, 4, 1]


def test_two_shards_of_one_name(tmp_path):
    folder = make_data_set(tmp_path / "d")
    shards = list(read_manifest(folder).shards)
    with pytest.raises(ShardError, match=r"Two shards of one data set are named 's-000\.tar'"):
        make_manifest(folder, [*shards, shards[0]])
