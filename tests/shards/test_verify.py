import os
from dataclasses import replace

import pytest

from shards.errors import ShardError
from shards.index import build_manifest, index_tar
from shards.manifest import read_manifest, sidecar_path, write_manifest
from shards.sample import Sample
from shards.sidecar import write_index
from shards.verify import Fault, verify
from tests.shards.recordings import clip, sound_only_mp4, tone
from tests.shards.tars import flip_bit, jpeg, make_data_set, pair, write_tar


@pytest.fixture
def folder(tmp_path):
    return make_data_set(tmp_path / "d")


def _part(folder, shard, row, ext):
    return next(part for part in index_tar(folder / f"s-{shard:03d}.tar")[row].parts if part.ext == ext)


def test_a_sound_data_set(folder):
    seen = []
    report = verify(folder, full=True, progress=lambda done, total: seen.append((done, total)))
    assert report.sound
    assert (report.shards, report.rows, report.checked) == (3, 12, 12)
    assert str(report) == "3 shards, 12 samples, 12 read and decoded: no fault."
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert verify(folder).checked == 0
    assert verify(folder, sample=5).checked == 5
    assert verify(folder, sample=500).checked == 12


def test_a_flipped_bit_of_a_part_names_the_sample(folder):
    flip_bit(folder / "s-001.tar", _part(folder, 1, 2, "jpg").offset + 40)
    assert verify(folder).sound
    report = verify(folder, full=True)
    assert [(fault.shard, fault.key) for fault in report.faults] == [("s-001.tar", None), ("s-001.tar", "k0007")]
    lines = str(report).splitlines()
    assert lines[0] == "s-001.tar: the tar's sha256 differs from the manifest's."
    assert lines[1].startswith("s-001.tar:k0007: the part 'jpg' at byte ")
    assert lines[2] == "3 shards, 12 samples, 12 read and decoded: 2 faults."
    assert [fault.key for fault in verify(folder, sample=12).faults] == ["k0007"]


def test_a_flipped_bit_of_a_header_names_the_shard(folder):
    flip_bit(folder / "s-001.tar", _part(folder, 1, 2, "jpg").offset - 512)
    assert [(fault.shard, fault.key) for fault in verify(folder, full=True).faults] == [("s-001.tar", None)]


def test_a_truncated_tar_names_each_sample_that_is_lost(folder):
    (folder / "s-002.tar").chmod(0o644)
    os.truncate(folder / "s-002.tar", _part(folder, 2, 2, "jpg").offset)
    report = verify(folder, full=True)
    assert [fault.key for fault in report.faults] == [None, "k0010", "k0011"]
    assert "bytes, the manifest says" in report.faults[0].problem


def test_missing_and_foreign_files(folder):
    (folder / "s-000.index.arrow").unlink()
    flip_bit(folder / "s-001.index.arrow", 700)
    (folder / "s-002.tar").unlink()
    write_tar(folder / "t.tar", [pair(0)])
    (folder / "u.index.arrow").touch()
    assert [str(fault) for fault in verify(folder, full=True).faults] == [
        f"s-000.tar: its sidecar s-000.index.arrow is missing; run `mmscale shards index {folder}`.",
        "s-001.tar: the sha256 of its sidecar s-001.index.arrow differs from the manifest's.",
        "s-002.tar: the tar is missing.",
        f"t.tar: the tar is not in the manifest; run `mmscale shards index {folder}` to take it in, or delete it.",
        "u.tar: there is a sidecar without its tar.",
    ]


def test_samples_that_do_not_decode_or_parse(tmp_path):
    samples = [
        Sample("cut", {"jpg": jpeg(0)[:300]}),
        Sample("no_image", {"png": b"hello", "txt": b"fine"}),
        Sample("latin", {"txt": "café".encode("latin-1")}),
        Sample("json", {"json": b"{"}),
        pair(1),
        pair(1),
    ]
    tar = write_tar(tmp_path / "a.tar", samples[:-1])
    entries = index_tar(tar)
    write_index(
        sidecar_path(tar), [*entries[:-1], replace(entries[-1], key="cut"), entries[-1]]
    )  # as other writers of sidecars may leave it
    build_manifest(tmp_path)
    faults = verify(tmp_path, full=True).faults
    assert [fault.key for fault in faults] == ["cut", "cut", "no_image", "latin", "json"]
    assert faults[0] == Fault("a.tar", "cut", "this key occurs more than once in the shard.")
    assert "its jpg does not decode: " in faults[1].problem
    assert "its png does not decode: cannot identify image file" in faults[2].problem
    assert "its txt part is not UTF-8" in faults[3].problem
    assert "cannot be parsed" in faults[4].problem


def test_no_data_set(tmp_path):
    with pytest.raises(ShardError, match=r"has no manifest\.parquet"):
        verify(tmp_path)


def test_a_data_set_without_rows(tmp_path):
    write_manifest(tmp_path, [])
    assert read_manifest(tmp_path).rows == 0
    assert verify(tmp_path, sample=3, full=True).sound


def test_sound_and_video_are_decoded_to_their_end(tmp_path):
    film, sound = clip(60, kind="webm"), tone(kind="FLAC")
    damaged = bytearray(clip(60, kind="mp4"))
    damaged[len(damaged) // 3 : len(damaged) // 2] = bytes(len(damaged) // 2 - len(damaged) // 3)
    samples = [
        Sample("whole", {"webm": film, "flac": sound, "m4a": sound_only_mp4(), "000.jpg": jpeg(0)}),
        Sample("short_film", {"webm": film[: len(film) // 2]}),
        Sample("short_sound", {"flac": sound[: len(sound) // 2]}),
        Sample("no_sound", {"m4a": b"nothing"}),
        Sample("frame", {"000.jpg": jpeg(0), "001.jpg": jpeg(1)[:300]}),
        Sample("damaged", {"mp4": bytes(damaged)}),
    ]
    tar = write_tar(tmp_path / "a.tar", samples)
    write_index(sidecar_path(tar), index_tar(tar))
    build_manifest(tmp_path)
    faults = {fault.key: fault.problem for fault in verify(tmp_path, full=True).faults}
    assert list(faults) == ["short_film", "short_sound", "no_sound", "frame", "damaged"]
    assert "its webm does not decode: The video ends after" in faults["short_film"]
    assert "its flac does not decode" in faults["short_sound"]
    assert "its 001.jpg does not decode" in faults["frame"]
