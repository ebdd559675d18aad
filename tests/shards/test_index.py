import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import google_crc32c
import pyarrow as pa
import pytest
import webdataset

from shards.errors import ShardError
from shards.index import adopt, build_manifest, describe, index_tar, shard_info
from shards.manifest import sidecar_path
from shards.sample import Sample
from shards.sidecar import read_index, write_index
from tests.shards.tars import flip_bit, jpeg, make_data_set, pair, read_with_webdataset, write_tar


def test_entries_point_at_the_bytes(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [pair(0), pair(1)])
    data = tar.read_bytes()
    entries = index_tar(tar)
    assert [entry.key for entry in entries] == ["k0000", "k0001"]
    for number, entry in enumerate(entries):
        found = {part.ext: data[part.offset : part.offset + part.size] for part in entry.parts}
        assert found == pair(number).parts
        assert all(part.crc32c == google_crc32c.value(found[part.ext]) for part in entry.parts)
        assert (entry.width, entry.height, entry.caption_length) == (24, 16, 9)


def test_webdataset_reads_what_we_index_in_the_same_order(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write({"__key__": f"n{number}", "jpg": jpeg(number), "txt": f"text {number}", "json": {"number": number}})
    adopt(tmp_path)
    tars = sorted(tmp_path.glob("*.tar"))
    theirs = read_with_webdataset(tars)
    ours = [entry for tar in tars for entry in index_tar(tar)]
    assert [sample["__key__"] for sample in theirs] == [entry.key for entry in ours]
    assert [{ext for ext in sample if not ext.startswith("__")} for sample in theirs] == [{p.ext for p in entry.parts} for entry in ours]


def test_foreign_names_are_grouped_as_webdataset_groups_them(tmp_path):
    names = ["dir/", "dir/a.JPG", "dir/a.left.txt", "__meta__", "README", "a.txt", "b.txt"]
    with tarfile.open(tmp_path / "f.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = 0 if name.endswith("/") else 3
            member.mtime = 0.5  # a pax header before each member
            tar.addfile(member, io.BytesIO(b"abc"))
    entries = index_tar(tmp_path / "f.tar")
    assert [(entry.key, [part.ext for part in entry.parts]) for entry in entries] == [
        ("dir/a", ["jpg", "left.txt"]),
        ("a", ["txt"]),
        ("b", ["txt"]),
    ]
    theirs = read_with_webdataset([tmp_path / "f.tar"])
    assert [sample["__key__"] for sample in theirs] == [entry.key for entry in entries]


def test_describe_leaves_out_what_it_cannot_know():
    entry = describe(Sample("k", {"jpg": b"no picture", "txt": b"\xff"}), {"jpg": 512, "txt": 2048})
    assert (entry.width, entry.height, entry.caption_length) == (None, None, None)
    assert [(part.ext, part.offset, part.size) for part in entry.parts] == [("jpg", 512, 10), ("txt", 2048, 1)]


def test_caption_length_is_that_of_the_longest():
    assert describe(Sample("k", {"json": b'{"captions": ["one", "three"]}'}), {"json": 0}).caption_length == 5


def test_sidecar_round_trip_and_same_bytes(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [pair(0), Sample("only_text", {"txt": b"hi"})])
    entries = index_tar(tar)
    write_index(sidecar_path(tar), entries)
    first = sidecar_path(tar).read_bytes()
    rows = read_index(sidecar_path(tar)).to_pylist()
    assert [row["key"] for row in rows] == ["k0000", "only_text"]
    assert rows[1]["width"] is None
    assert rows[0]["parts"][0] == {name: getattr(entries[0].parts[0], name) for name in ("ext", "offset", "size", "crc32c")}
    write_index(sidecar_path(tar), entries, tar_sha256=shard_info(tar).sha256)
    assert sidecar_path(tar).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.index.arrow", "a.tar"]


def test_a_shard_without_samples_is_a_shard(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [])
    write_index(sidecar_path(tar), index_tar(tar))
    info = shard_info(tar)
    assert (info.rows, info.image_count, info.width_min, info.caption_length_mean) == (0, 0, None, None)


def test_adopt_indexes_only_what_lacks_a_valid_sidecar(tmp_path):
    folder = make_data_set(tmp_path / "d")
    sidecars = [sidecar_path(tar) for tar in sorted(folder.glob("*.tar"))]
    sidecars[0].unlink()
    sidecars[1].write_bytes(b"broken")
    before = sidecars[2].stat().st_mtime_ns
    digest = build_digest = adopt(folder).digest
    assert sidecars[2].stat().st_mtime_ns == before
    assert all(read_index(path).num_rows for path in sidecars)
    write_tar(folder / "s-002.tar", [pair(99)])
    later = time.time() + 5
    os.utime(folder / "s-002.tar", (later, later))
    seen = []
    manifest = adopt(folder, progress=lambda done, total, name: seen.append((done, total, name)))
    assert manifest.rows_per_shard.tolist() == [5, 3, 1]
    assert manifest.digest != digest == build_digest
    assert seen == [(1, 3, "s-000.tar"), (2, 3, "s-001.tar"), (3, 3, "s-002.tar")]
    assert build_manifest(folder) == manifest


def test_adopt_names_every_tar_it_cannot_index_and_indexes_the_others(tmp_path):
    for name in ("a", "b", "c", "d"):
        write_tar(tmp_path / f"{name}.tar", [pair(0), pair(1)])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").chmod(0o644)
    (tmp_path / "b.tar").write_bytes(whole[: index_tar(tmp_path / "a.tar")[1].parts[0].offset - 512])  # at a member's border
    flip_bit(tmp_path / "c.tar", index_tar(tmp_path / "a.tar")[1].parts[0].offset - 512)  # a header
    with pytest.raises(ShardError, match=r"2 of 4 tars cannot be used.*b\.tar.*cut short.*c\.tar.*no end-of-archive mark"):
        adopt(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.arrow")) == ["a.index.arrow", "d.index.arrow"]


@pytest.mark.parametrize("keep", [0, 100, 1000, -700, -2000])
def test_a_tar_cut_anywhere_is_no_tar(tmp_path, keep):
    tar = write_tar(tmp_path / "a.tar", [Sample("k", {"txt": b"x" * 6000}), Sample("l", {"txt": b"y" * 700})])
    data = tar.read_bytes().rstrip(b"\0")
    (tmp_path / "cut.tar").write_bytes(data[:keep])
    with pytest.raises(ShardError, match=r"cut\.tar' is cut short, damaged or not a plain tar"):
        index_tar(tmp_path / "cut.tar")


def test_index_errors(tmp_path):
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    with pytest.raises(ShardError, match="not a plain tar"):
        index_tar(tmp_path / "z.tar")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name in ("k.txt", "k.TXT"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match=r"twice\.tar:k: .*part 'txt' of this sample twice"):
        index_tar(tmp_path / "twice.tar")
    with pytest.raises(ShardError, match=r"no \.tar files in"):
        adopt(tmp_path / "nowhere")


def test_sidecar_errors(tmp_path):
    with pytest.raises(ShardError, match=r"no sidecar .*Run `mmscale shards index"):
        read_index(tmp_path / "a.index.arrow")
    (tmp_path / "a.index.arrow").write_bytes(b"")
    with pytest.raises(ShardError, match="is not a sidecar"):
        read_index(tmp_path / "a.index.arrow")
    with pa.OSFile(str(tmp_path / "a.index.arrow"), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("key", pa.string())])):
        pass
    with pytest.raises(ShardError, match="sidecar of another format than version 3"):
        read_index(tmp_path / "a.index.arrow")
    tar = write_tar(tmp_path / "b.tar", [pair(0)])
    write_index(sidecar_path(tar), index_tar(tar))
    write_tar(tar, [pair(number) for number in range(9)])
    with pytest.raises(ShardError, match=r"'b\.tar' has \d+ bytes but its sidecar was made for \d+"):
        shard_info(tar)


def test_what_a_killed_command_left_is_removed(tmp_path: Path) -> None:
    folder = make_data_set(tmp_path / "d", (3,))
    ended = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from shards.commit import temporary; import sys, pathlib; "
            "path = temporary(pathlib.Path(sys.argv[1])); path.write_bytes(b'half')",
            str(folder / "shard.index.arrow"),
        ]
    )
    assert ended.wait() == 0
    assert any(path.name.startswith(".") for path in folder.iterdir())
    adopt(folder)
    assert not any(path.name.startswith(".") for path in folder.iterdir())
