import json
import os
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.errors import ConfigError, ShardError
from shards.index import adopt
from shards.manifest import read_manifest
from shards.sample import Sample
from shards.verify import verify
from shards.versions.dedup import DedupConfig, dedup_data_set
from tests.shards.pictures import encoded
from tests.shards.tars import flip_bit, make_data_set, write_tar
from tests.shards.test_near import drawing
from tests.shards.versions import config, content, keys


def sample(key: str, image: bytes, caption: str = "") -> Sample:
    return Sample(key, {"png": image, **({"txt": caption.encode()} if caption else {})})


def twins(folder):
    """Two shards: drawings 0 to 5, then copies of some, exact (e) and near (n)."""
    folder.mkdir(parents=True)
    originals = [sample(f"d{number}", encoded(drawing(number), "PNG"), f"drawing {number}") for number in range(6)]
    small = encoded(drawing(2).resize((80, 80)), "PNG")
    copies = [
        sample("e1", originals[1].parts["png"], "drawing 1"),
        sample("e3", originals[3].parts["png"], "another caption"),
        sample("n2", small, "drawing 2"),
        sample("e2", small, "drawing 2"),
        sample("new", encoded(drawing(77), "PNG")),
        Sample("text", {"txt": b"no picture"}),
        Sample("text2", {"txt": b"no picture"}),
    ]
    write_tar(folder / "a.tar", originals)
    write_tar(folder / "b.tar", copies)
    adopt(folder)
    return folder


def dedup(base, out, *words):
    return dedup_data_set(base, config(DedupConfig, out, *words, "processes=1"), progress=False)


def test_exact_duplicates(tmp_path):
    base = twins(tmp_path / "base")
    summary = dedup(base, tmp_path / "new")
    assert (summary.kept, summary.rows, summary.exact, summary.near) == (10, 13, 3, 0)
    assert keys(tmp_path / "new") == ["d0", "d1", "d2", "d3", "d4", "d5", "n2", "new", "text", "text2"]
    assert verify(tmp_path / "new", full=True).sound
    rows = pq.read_table(tmp_path / "new" / "duplicates.parquet").to_pylist()
    nowhere = {"shard": "b.tar", "of_data_set": None, "kind": "exact", "distance": 0}
    assert rows == [
        {**nowhere, "key": "e1", "of_shard": "a.tar", "of_key": "d1"},
        {**nowhere, "key": "e3", "of_shard": "a.tar", "of_key": "d3"},
        {**nowhere, "key": "e2", "of_shard": "b.tar", "of_key": "n2"},
    ]
    assert not (tmp_path / "new" / "near-duplicates.png").exists()


def test_near_duplicates_and_their_sheet(tmp_path):
    base = twins(tmp_path / "base")
    summary = dedup(base, tmp_path / "new", "near=3")
    assert (summary.kept, summary.exact, summary.near) == (9, 2, 2)
    assert "9 of 13 samples kept, 2 exact and 2 near duplicates dropped" in str(summary)
    rows = pq.read_table(tmp_path / "new" / "duplicates.parquet").to_pylist()
    assert [(row["key"], row["of_key"], row["kind"]) for row in rows if row["kind"] == "near"] == [
        ("n2", "d2", "near"),
        ("e2", "d2", "near"),
    ]
    with Image.open(tmp_path / "new" / "near-duplicates.png") as sheet:
        assert sheet.width > 300


def test_pairs_are_duplicates_only_with_equal_captions(tmp_path):
    base = twins(tmp_path / "base")
    dedup(base, tmp_path / "new", "near=3", "by=pair")
    assert [row["key"] for row in pq.read_table(tmp_path / "new" / "duplicates.parquet").to_pylist()] == ["e1", "n2", "e2"]


def test_what_another_data_set_holds_is_dropped(tmp_path):
    base = twins(tmp_path / "base")
    write_tar(tmp_path / "t.tar", [sample("t0", encoded(drawing(0).resize((90, 90)))), sample("t1", encoded(drawing(0).resize((90, 90))))])
    adopt(tmp_path)
    dedup(base, tmp_path / "new", "near=3", f"against=[{tmp_path}]")
    rows = pq.read_table(tmp_path / "new" / "duplicates.parquet").to_pylist()
    assert (rows[0]["key"], rows[0]["of_data_set"], rows[0]["of_shard"], rows[0]["of_key"]) == ("d0", str(tmp_path), "t.tar", "t0")
    assert "d0" not in keys(tmp_path / "new")
    assert [row["of_data_set"] for row in rows[1:]] == [None] * 4


def test_the_digest_of_the_original_counts_where_it_is_noted(tmp_path):
    note = b'{"sha256": "%s"}' % (b"ab" * 32)
    write_tar(tmp_path / "a.tar", [Sample(f"k{size}", {"png": encoded(drawing(1, size), "PNG"), "json": note}) for size in (50, 60)])
    adopt(tmp_path)
    assert dedup(tmp_path, tmp_path / "new").exact == 1


def test_the_same_bytes_for_any_number_of_processes_and_shared_features(tmp_path):
    base = twins(tmp_path / "base")
    dedup(base, tmp_path / "one", "near=3", f"features={tmp_path / 'features'}")
    files = content(tmp_path / "features")
    assert len(files) == 2
    dedup_data_set(base, config(DedupConfig, tmp_path / "two", "near=3", "processes=2"), progress=False)
    assert {f"features/{name}": data for name, data in files.items()} | content(tmp_path / "one") == content(tmp_path / "two")
    flip_bit(base / "a.tar", 600)  # with the features there, no picture is read again
    dedup(base, tmp_path / "three", "near=1", f"features={tmp_path / 'features'}")


def test_killed_and_repeated_it_goes_on_where_it_was(tmp_path):
    base = make_data_set(tmp_path / "base", (30,) * 12)
    words = [f"out={tmp_path / 'cut'}", "near=2", "processes=2"]
    program = "import sys\nfrom launcher.cli import main\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "shards", "dedup", str(base), *words], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cut").glob("features/*.arrow"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, 9)
    process.wait()
    psutil.wait_procs(everyone, timeout=60)  # until then its half-written files count as somebody's
    assert not (tmp_path / "cut" / "manifest.parquet").exists()
    (tmp_path / "cut" / "features" / ".half.arrow.tmp").touch()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "features").glob("*.arrow")}
    dedup(base, tmp_path / "cut", "near=2")
    dedup(base, tmp_path / "whole", "near=2")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert made
    assert all(path.stat().st_mtime_ns == written for path, written in made.items())


def test_errors(tmp_path):
    base = twins(tmp_path / "base")
    with pytest.raises(ConfigError, match="`near` must be 0 to 12 bits; got 13"):
        dedup(base, tmp_path / "x", "near=13")
    with pytest.raises(ConfigError, match=r"`against`: .*base' is the data set itself: nothing would stay"):
        dedup(base, tmp_path / "x", f"against=[{base}]")
    with pytest.raises(ShardError, match="There is no data set folder"):
        dedup(base, tmp_path / "x", "against=[/nowhere]")
    part = next(iter(adopt(base).shards))
    flip_bit(base / part.shard, 600)
    with pytest.raises(Exception, match=r"a\.tar:d0: the part 'png' at byte \d+ does not match its checksum\. Run `mmscale shards verify"):
        dedup(base, tmp_path / "x", "near=2")


def test_a_version_of_nothing(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    adopt(tmp_path)
    assert dedup(tmp_path, tmp_path / "new", "near=2").kept == 0
    assert read_manifest(tmp_path / "new").rows == 0


def test_questions_about_one_picture_are_no_pairs_of_duplicates(tmp_path):
    (tmp_path / "base").mkdir()
    asked = [
        Sample(
            f"q{n}", {"png": encoded(drawing(n // 3), "PNG"), "json": json.dumps({"question": f"what {n % 3}?", "question_id": n}).encode()}
        )
        for n in range(6)
    ]
    again = {"question": "what 1?", "question_id": 77, "input_sha256": "x"}
    write_tar(tmp_path / "base" / "a.tar", [*asked, Sample("again", asked[4].parts | {"json": json.dumps(again).encode()})])
    adopt(tmp_path / "base")
    assert dedup(tmp_path / "base", tmp_path / "pair", "by=pair").kept == 6
    assert keys(tmp_path / "pair") == [sample.key for sample in asked]
    assert dedup(tmp_path / "base", tmp_path / "picture").kept == 2
