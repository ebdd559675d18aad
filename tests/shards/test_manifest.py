from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from shards.errors import ShardError
from shards.manifest import make_manifest, read_manifest, write_manifest
from tests.shards.tars import make_data_set


def test_round_trip_and_statistics(tmp_path):
    folder = make_data_set(tmp_path / "d")
    manifest = read_manifest(folder)
    assert manifest.rows_per_shard.tolist() == [5, 3, 4]
    assert manifest.rows == 12
    assert manifest.bytes == sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    first = manifest.shards[0]
    assert (first.shard, first.image_count, first.caption_count) == ("s-000.tar", 5, 5)
    assert (first.width_min, first.width_mean, first.width_max, first.height_max) == (24, 24.0, 24, 16)
    assert (first.caption_length_min, first.caption_length_max) == (9, 9)
    assert pq.read_table(folder / "manifest.parquet").num_rows == 3


def test_digest_depends_on_content_alone(tmp_path):
    one, two = make_data_set(tmp_path / "a"), make_data_set(tmp_path / "b")
    manifest = read_manifest(one)
    assert manifest.digest == read_manifest(two).digest
    assert write_manifest(two, manifest.shards[::-1]).digest == manifest.digest
    for change in ({"rows": 9}, {"sha256": "0" * 64}, {"index_sha256": "0" * 64}, {"shard": "t.tar"}, {"mask": b"\x01"}):
        assert make_manifest(one, [replace(manifest.shards[0], **change), *manifest.shards[1:]]).digest != manifest.digest
    moved = make_manifest(one, [replace(manifest.shards[0], location="../elsewhere"), *manifest.shards[1:]])
    assert moved.digest == manifest.digest
    assert moved != manifest


def test_errors_name_what_to_run(tmp_path):
    with pytest.raises(ShardError, match=r"no data set folder .*mmscale shards write"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"has no manifest\.parquet.*mmscale shards index"):
        read_manifest(tmp_path)
    folder = make_data_set(tmp_path / "d")
    (folder / "s-001.index.arrow").unlink()
    with pytest.raises(ShardError, match=r"'s-001\.tar' .* lacks its sidecar 's-001\.index\.arrow'\. Run `mmscale shards index"):
        read_manifest(folder)
    (folder / "s-001.tar").unlink()
    with pytest.raises(ShardError, match=r"'s-001\.tar' .* is in the manifest but not in the folder"):
        read_manifest(folder)
    assert read_manifest(folder, check_files=False).rows == 12


def test_a_damaged_or_edited_manifest_is_refused(tmp_path):
    folder = make_data_set(tmp_path / "d")
    path = folder / "manifest.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ShardError, match="does not match its own checksum: it was edited or damaged"):
        read_manifest(folder)
    pq.write_table(table.drop_columns(["rows"]), path)
    with pytest.raises(ShardError, match="is not a manifest"):
        read_manifest(folder)
    path.write_bytes(b"PAR1 and nothing")
    with pytest.raises(ShardError, match="is not a manifest"):
        read_manifest(folder)
