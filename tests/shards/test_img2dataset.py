"""`img2dataset/` beside this file is what img2dataset 1.47.0 wrote: 5 downloads, of which one was no image."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import img2dataset
from shards.errors import ShardError
from shards.index import adopt, index_tar
from shards.manifest import sidecar_path
from shards.read import ShardReader
from shards.sidecar import write_index
from tests.shards.tars import pair, write_tar

OUTPUT = Path(__file__).parent / "img2dataset"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(OUTPUT, tmp_path / "laion")


def test_its_output_is_adopted_with_its_tables(folder):
    manifest = adopt(folder)
    assert (manifest.rows, manifest.shards[0].image_count, manifest.shards[0].caption_count) == (4, 4, 4)
    found = img2dataset.downloads([folder / "00000.tar"])
    assert (found.attempted, found.outcomes) == (5, {"success": 4, "Image decoding error": 1})
    assert str(found) == "img2dataset: 4 of 5 downloads succeeded; 1 Image decoding error"
    reader = ShardReader(folder)
    keys = reader.index(0)["key"].to_pylist()
    assert keys == ["000001", "000002", "000000", "000004"]  # in the order of the downloads
    rows = img2dataset.metadata(folder / "00000.tar", keys).to_pylist()
    for place, row in enumerate(rows):
        sample = reader[0, place]
        assert (row["key"], row["status"], [row["caption"]]) == (sample.key, "success", sample.captions())
        assert {name: row[name] for name in ("url", "sha256", "original_width")} == {
            name: sample.fields()[name] for name in ("url", "sha256", "original_width")
        }


def test_other_folders_have_no_tables(tmp_path):
    write_tar(tmp_path / "a.tar", [pair(0)])
    (tmp_path / "x_stats.json").write_text("{}")
    assert not img2dataset.is_output(tmp_path)
    assert adopt(tmp_path).rows == 1


def test_a_tar_of_an_ended_run_is_refused_by_name(folder):
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:9000])
    with pytest.raises(ShardError, match=r"1 of 2 tars cannot be used.*00001\.tar' is cut short"):
        adopt(folder)
    (folder / "00001.tar").write_bytes(whole)  # complete, and yet what belongs to it is not there
    with pytest.raises(ShardError, match=r"00001\.tar' is unfinished: .* before it wrote '00001_stats\.json'.*incremental"):
        adopt(folder)
    shutil.copy(folder / "00000_stats.json", folder / "00001_stats.json")
    with pytest.raises(ShardError, match=r"00001\.tar' has no table '00001\.parquet' beside it"):
        adopt(folder)
    assert not (folder / "manifest.parquet").exists()


def _edit(folder, change):
    table = pq.read_table(folder / "00000.parquet").to_pylist()
    change(table)
    pq.write_table(pa.Table.from_pylist(table), folder / "00000.parquet")


def test_keys_that_disagree_are_named(folder):
    _edit(folder, lambda rows: next(row for row in rows if row["status"] != "success").update(status="success"))
    with pytest.raises(ShardError, match=r"'00000\.parquet' says to have been downloaded, and the tar lacks 00000\.tar:000003\."):
        adopt(folder)
    _edit(folder, lambda rows: [row.update(status="failed_to_download") for row in rows])
    match = r"does not know as downloaded, and the tar holds 00000\.tar:000000, 00000\.tar:000001, 00000\.tar:000002 and 1 more"
    with pytest.raises(ShardError, match=match):
        adopt(folder)


def test_counts_that_disagree_are_named(folder):
    path = folder / "00000_stats.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"successes": 9}))
    with pytest.raises(ShardError, match=r"'00000_stats\.json' counts 9 downloads and '00000\.tar' holds 4 samples"):
        adopt(folder)
    for damaged in ("", "[]"):
        path.write_text(damaged)
        with pytest.raises(ShardError, match=r"00000_stats\.json' is damaged"):
            adopt(folder)


def test_a_table_that_is_none_is_named(folder):
    tar = folder / "00000.tar"
    write_index(sidecar_path(tar), index_tar(tar))
    (folder / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ShardError, match=r"00000\.parquet' is no table of img2dataset's"):
        adopt(folder)
    pq.write_table(pa.table({"key": ["000000"]}), folder / "00000.parquet")
    with pytest.raises(ShardError, match=r"00000\.parquet' is no table of img2dataset's"):
        img2dataset.downloads([tar])


def test_a_key_without_a_row_is_named(folder):
    with pytest.raises(ShardError, match=r"00000\.tar:nobody: there is no row for this key in '00000\.parquet'"):
        img2dataset.metadata(folder / "00000.tar", ["000000", "nobody"])
