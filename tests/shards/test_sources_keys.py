"""Rows of parquet that are looked up, against the same rows listed one by one from a text table."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import configfile
from shards.config import WriteConfig
from shards.sources.keys import Repeats, hash_keys, keys_of_paths
from shards.sources.record import Record, safe_key
from shards.sources.table import TableSource

CELLS = ["a.jpg", "b/c.png", "b__c.jpg", "a-2.jpg", "a-3.jpg", " a.jpg", "/x/y.jpg", "ä.jpg", "noext", ".hidden", "", "..", "v1.2.jpg"]
CELLS += ["x" * 100 + ".jpg", "a b.jpg", "_/u.jpg", "a-02.jpg", "a-2-2.jpg", "a/b.c/d.jpg"]


def records(folder: Path, kind: str, rows: list[dict[str, str | None]], *words: str) -> list[Record]:
    path = folder / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"image": pa.array([row["image"] for row in rows], pa.string())}), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configfile.load(WriteConfig, None, ["source=table", f"path={path}", "out=x", "columns.caption=null", *words])
    return list(TableSource(config).records())


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(st.sampled_from(CELLS), min_size=1, max_size=12))
@pytest.mark.parametrize("words", [(), ("columns.key=image",)])
def test_the_same_keys_as_row_by_row(tmp_path_factory: pytest.TempPathFactory, words: tuple[str, ...], cells: list[str]) -> None:
    folder = tmp_path_factory.mktemp("t")
    rows: list[dict[str, str | None]] = [{"image": cell} for cell in cells]
    looked_up, listed = records(folder, "parquet", rows, *words), records(folder, "jsonl", rows, *words)
    assert [record.key for record in looked_up] == [record.key for record in listed]
    reasons = [[record.problem[0] if record.problem else None for record in found] for found in (looked_up, listed)]
    assert reasons[0] == reasons[1]


@given(cells=st.lists(st.text(max_size=20) | st.sampled_from(CELLS), max_size=8))
def test_keys_of_paths_are_safe_keys(cells: list[str]) -> None:
    cells = [cell for cell in cells if "\x00" not in cell]
    found = keys_of_paths(pa.array(cells, pa.string()), [f"row-{i}" for i in range(len(cells))]).to_pylist()
    for i, cell in enumerate(cells):
        named = cell.strip() and Path(cell.strip()).name
        assert found[i] == safe_key(str(Path(cell.strip()).with_suffix("")).lstrip("/") if named else f"row-{i}")


def test_slices_and_places(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(20)]}), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(5)]}), tmp_path / "b.parquet")
    words = ["source=table", f"path={tmp_path}", "out=x", "columns.caption=null"]
    found = TableSource(configfile.load(WriteConfig, None, words)).records()
    whole = list(found)
    assert [record.key for record in whole] == [f"{n}" for n in range(20)] + [f"{n}-2" for n in range(5)]
    assert found[5:16] == whole[5:16]
    assert found[-1] == whole[24]
    assert [found[n] for n in range(25)] == whole
    with pytest.raises(IndexError, match="There is no row 25: the tables have 25"):
        found[25]


def test_files_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / folder / "part.parquet")
    words = ["source=table", f"path={tmp_path}/*/part.parquet", "out=x", "columns.caption=null"]
    keys = [record.key for record in TableSource(configfile.load(WriteConfig, None, words)).records()]
    assert keys == ["00000-part-000000000", "00000-part-000000001", "00001-part-000000000", "00001-part-000000001"]


def test_hashes_tell_keys_apart() -> None:
    keys = [f"{a}-{b}" for a in range(300) for b in range(300)] + ["", "ab", "ba", "aab", "x" * 80]
    assert len(set(hash_keys(pa.array(keys)).tolist())) == len(keys)
    sliced = pa.array(["skipped", *keys]).slice(1)
    assert np.array_equal(hash_keys(sliced), hash_keys(pa.array(keys)))


def test_rows_that_share_a_key() -> None:
    repeats = Repeats(hash_keys(pa.array(["a", "b", "a", "c", "b", "a"])))
    assert [repeats.rank(row) for row in range(6)] == [1, 1, 2, 0, 2, 3]
    assert repeats.sharing(2).tolist() == [0, 2, 5]
    assert repeats.sharing(4).tolist() == [1, 4]
