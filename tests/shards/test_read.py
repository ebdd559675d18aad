import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards import read
from shards.errors import IntegrityError, ShardError
from shards.index import adopt, index_tar
from shards.order import GlobalOrder
from shards.read import ShardReader
from tests.shards.tars import flip_bit, jpeg, make_data_set, pair, read_with_webdataset, write_tar


@pytest.fixture
def folder(tmp_path):
    return make_data_set(tmp_path / "d")


def _numbers(reader, positions, order):
    _, shards, rows = order.locate(positions)
    return [reader[place].fields()["number"] for place in zip(shards.tolist(), rows.tolist(), strict=True)]


def _part(folder, shard, row, ext):
    return next(part for part in index_tar(folder / f"s-{shard:03d}.tar")[row].parts if part.ext == ext)


def test_every_sample_by_shard_and_row(folder):
    reader = ShardReader(folder)
    assert len(reader) == 12
    assert reader.rows_per_shard.tolist() == [5, 3, 4]
    places = [(shard, row) for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]
    assert [reader[place] for place in places] == [pair(number) for number in range(12)]
    assert [reader.key(*place) for place in places] == [f"k{number:04d}" for number in range(12)]
    assert reader.index(1)["width"].to_pylist() == [24, 24, 24]


def test_the_order_reads_every_sample_once_an_epoch(folder):
    reader = ShardReader(folder)
    numbers = _numbers(reader, np.arange(24), GlobalOrder(reader.rows_per_shard, 1, lanes=2, block=4, whole=0))
    assert sorted(numbers[:12]) == sorted(numbers[12:]) == list(range(12))


def test_we_read_what_webdataset_wrote_byte_for_byte(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"dir/n{number}", "jpg": jpeg(number), "cls": number, "txt": "text"})
    adopt(tmp_path)
    reader = ShardReader(tmp_path)
    theirs = read_with_webdataset(sorted(tmp_path.glob("*.tar")))
    ours = [reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]
    assert [(s.key, dict(s.parts)) for s in ours] == [
        (t["__key__"], {ext: data for ext, data in t.items() if not ext.startswith("__")}) for t in theirs
    ]


def test_a_flipped_bit_is_named(folder):
    part = _part(folder, 1, 2, "jpg")
    flip_bit(folder / "s-001.tar", part.offset + part.size // 2)
    reader = ShardReader(folder)
    assert reader[1, 1] == pair(6)
    match = rf"s-001\.tar:k0007: the part 'jpg' at byte {part.offset} does not match its checksum crc32c {part.crc32c:08x}"
    with pytest.raises(IntegrityError, match=match):
        reader[1, 2]


def test_a_truncated_tar_is_named_at_the_first_sample_it_lacks(folder):
    part = _part(folder, 2, 1, "txt")
    (folder / "s-002.tar").chmod(0o644)
    os.truncate(folder / "s-002.tar", part.offset + 3)
    reader = ShardReader(folder)
    assert reader[2, 0] == pair(8)
    with pytest.raises(IntegrityError, match=rf"s-002\.tar:k0009: the part 'txt' .* is cut off: the tar holds 3 of its {part.size} bytes"):
        reader[2, 1]
    with pytest.raises(IntegrityError, match=r"s-002\.tar:k0010: the part 'jpg' .* is cut off: the tar holds 0 of its"):
        reader[2, 2]


def test_wrong_bytes_are_fetched_once_more(folder):
    tar = folder / "s-000.tar"
    sound = tar.read_bytes()
    flip_bit(tar, _part(folder, 0, 0, "jpg").offset)
    reader = ShardReader(folder)
    with pytest.raises(IntegrityError):
        reader[0, 0]
    tar.rename(folder / "old")
    tar.write_bytes(sound)  # mended behind the open file: only opening it again sees it
    assert reader[0, 0] == pair(0)


def _replace_by_folder(tar):
    """Opening a folder succeeds and reading from it is refused, as on a mount that went away."""
    aside = tar.with_suffix(".aside")
    tar.rename(aside)
    tar.mkdir()
    return aside


def test_a_refused_read_is_tried_again(folder):
    tar = folder / "s-000.tar"
    aside = _replace_by_folder(tar)
    mend = threading.Timer(0.02, lambda: (tar.rmdir(), aside.rename(tar)))
    mend.start()
    assert ShardReader(folder)[0, 1] == pair(1)
    mend.join()


def test_a_read_that_stays_refused_is_named(folder, monkeypatch):
    monkeypatch.setattr(read, "RETRY_WAITS_S", (0.0, 0.0))
    reader = ShardReader(folder)
    _replace_by_folder(folder / "s-000.tar")
    with pytest.raises(ShardError, match=r"s-000\.tar:k0001 cannot be read, 3 times tried: .*Is a directory"):
        reader[0, 1]
    (folder / "s-001.tar").unlink()
    (folder / "s-001.tar").symlink_to(folder / "s-001.tar")
    with pytest.raises(ShardError, match=r"s-001\.tar cannot be read, 3 times tried: .*symbolic links"):
        reader[1, 0]


def test_missing_and_foreign_files(folder):
    reader = ShardReader(folder)
    (folder / "s-000.tar").unlink()
    with pytest.raises(ShardError, match=r"'s-000\.tar' is no longer in"):
        reader[0, 0]
    flip_bit(folder / "s-001.index.arrow", 900)
    with pytest.raises(ShardError, match=r"s-001\.index\.arrow' differs from the one in the manifest"):
        reader[1, 0]
    (folder / "s-000.tar").touch()
    (folder / "s-002.index.arrow").unlink()
    with pytest.raises(ShardError, match=r"'s-002\.tar' .* lacks its sidecar .*Run `mmscale shards index"):
        ShardReader(folder)


@pytest.mark.parametrize(
    ("place", "text"), [((3, 0), "no shard 3"), ((-1, 0), "no shard -1"), ((1, 3), r"no row 3 in s-001\.tar"), ((0, -1), "no row -1")]
)
def test_places_that_are_not_there(folder, place, text):
    with pytest.raises(IndexError, match=text):
        ShardReader(folder)[place]


def test_an_empty_shard_among_others(tmp_path):
    folder = make_data_set(tmp_path / "d", (2, 0, 1))
    reader = ShardReader(folder)
    assert [reader[0, 1], reader[2, 0]] == [pair(1), pair(2)]
    with pytest.raises(IndexError, match="no row 0"):
        reader[1, 0]


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_files_stay_open(tmp_path):
    folder = make_data_set(tmp_path / "d", (1,) * 12)
    reader = ShardReader(folder, open_shards=3)
    before = _open_files()
    assert [reader[shard, 0] for shard in range(12)] == [pair(number) for number in range(12)]
    assert _open_files() - before <= 3
    del reader
    assert _open_files() <= before


def test_threads_share_a_reader_that_closes_files_all_the_time(tmp_path):
    folder = make_data_set(tmp_path / "d", (3,) * 8)
    reader = ShardReader(folder, open_shards=1)
    places = [(int(i) // 3, int(i) % 3) for i in np.random.default_rng(0).integers(0, 24, 2000)]
    with ThreadPoolExecutor(8) as threads:
        samples = list(threads.map(reader.__getitem__, places))
    assert [sample.fields()["number"] for sample in samples] == [shard * 3 + row for shard, row in places]


def test_pickle_carries_the_path_alone(folder):
    reader = ShardReader(folder, open_shards=7)
    assert reader[0, 0] == pair(0)
    data = pickle.dumps(reader)
    assert len(data) < 400
    copy = pickle.loads(data)
    assert copy.open_shards == 7
    assert copy[2, 3] == pair(11)


def test_a_forked_child_reads_on_even_if_the_parent_held_the_lock(folder):
    reader = ShardReader(folder)
    assert reader[0, 0] == pair(0)
    with reader._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if reader[0, 1] == pair(1) and reader[1, 0] == pair(5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader[0, 1] == pair(1)


@pytest.mark.slow
def test_a_read_costs_little_next_to_a_decode(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"s-{shard}.tar", [pair(number) for number in range(shard * 500, shard * 500 + 500)])
    adopt(tmp_path)
    reader = ShardReader(tmp_path)
    _, shards, rows = GlobalOrder(reader.rows_per_shard, 0).locate(np.arange(len(reader)))
    places = list(zip(shards.tolist(), rows.tolist(), strict=True))
    took_s = []
    for _ in range(5):
        start = time.process_time()
        for place in places:
            reader[place]
        took_s.append(time.process_time() - start)
    assert min(took_s) / len(places) < 60e-6  # a decode of 256 x 256 pixels takes 250e-6 and more
