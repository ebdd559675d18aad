import functools
import http.server
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time

import pyarrow.parquet as pq
import pytest

from shards.errors import ShardError
from shards.index import adopt, build_manifest, index_tar
from shards.manifest import sidecar_path
from shards.repair import repair
from shards.sample import Sample
from shards.sidecar import read_index, write_index
from shards.verify import verify
from shards.versions.filter import FilterVersionConfig, filter_data_set
from tests.shards.tars import flip_bit, jpeg, make_data_set, pair, write_tar
from tests.shards.versions import config, content, keys


@pytest.fixture
def folder(tmp_path):
    return make_data_set(tmp_path / "d")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def damage(folder, shard, row):
    """Flip a bit of a picture; returns its key."""
    table = read_index(folder / f"s-{shard:03d}.index.arrow")
    part = next(part for part in table["parts"][row].as_py() if part["ext"] == "jpg")
    flip_bit(folder / f"s-{shard:03d}.tar", part["offset"] + 30)
    return table["key"][row].as_py()


def cut(tar, size):
    tar.chmod(0o644)
    os.truncate(tar, size)


def said(report):
    return [str(fault) for fault in report.done]


def test_nothing_to_do(folder):
    before = content(folder)
    seen = []
    report = repair(folder, progress=lambda done, total: seen.append((done, total)))
    assert str(report) == f"nothing was wrong; 12 samples, version {report.digest[:12]}"
    assert content(folder) == before
    assert seen[-1] == (3, 3)


def test_sidecars_missing_damaged_and_of_another_tar(tmp_path):
    folder = make_data_set(tmp_path / "d", (4, 4, 4, 1))
    before = content(folder)
    sidecar_path(folder / "s-000.tar").unlink()
    cut(folder / "s-001.index.arrow", 900)
    shutil.copy(folder / "s-003.index.arrow", folder / "s-002.index.arrow")
    assert "s-002.tar: the sha256 of its sidecar s-002.index.arrow differs from the manifest's: it is of another tar." in str(
        verify(folder)
    )
    report = repair(folder)
    assert said(report) == [
        "s-000.tar: indexed again; its sidecar was missing.",
        "s-001.tar: indexed again; its sidecar was damaged.",
        "s-002.tar: indexed again; its sidecar was another than the manifest's.",
    ]
    assert not report.failed
    assert report.digest == report.was
    assert content(folder) == before
    assert verify(folder, full=True).sound


def test_a_manifest_made_with_swapped_sidecars_of_tars_of_one_size(tmp_path):
    folder = make_data_set(tmp_path / "d", (4, 4))
    for number in range(2):
        rows = [Sample(f"{'ab'[number] * 4}{row}", {"txt": b"%d" % row}) for row in range(3)]
        write_tar(folder / f"s-00{number}.tar", rows)
        write_index(folder / f"s-00{number}.index.arrow", index_tar(folder / f"s-00{number}.tar"))
    one, two = folder / "s-000.index.arrow", folder / "s-001.index.arrow"
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    build_manifest(folder)
    assert [fault.problem.split(";")[0] for fault in verify(folder).faults] == [
        "its sidecar s-000.index.arrow is of another tar",
        "its sidecar s-001.index.arrow is of another tar",
    ]
    assert [fault.shard for fault in repair(folder).failed] == ["s-000.tar", "s-001.tar"]
    assert adopt(folder).rows == 6
    assert verify(folder, full=True).sound
    assert keys(folder) == ["aaaa0", "aaaa1", "aaaa2", "bbbb0", "bbbb1", "bbbb2"]


def test_damaged_samples_without_a_copy_are_left_out(folder):
    lost = [damage(folder, 0, 3), damage(folder, 1, 0)]
    report = repair(folder)
    assert said(report) == [
        f"s-000.tar:{lost[0]}: left out: its bytes differ from their checksums.",
        "s-000.tar: the tar is damaged and there is no copy; 4 of its 5 samples stay.",
        f"s-001.tar:{lost[1]}: left out: its bytes differ from their checksums.",
        "s-001.tar: the tar is damaged and there is no copy; 2 of its 3 samples stay.",
    ]
    assert not report.failed
    assert report.digest != report.was
    assert f"version {report.digest[:12]} (was {report.was[:12]})" in str(report)
    assert set(keys(folder)) == {f"k{number:04d}" for number in range(12)} - set(lost)
    assert verify(folder, full=True).sound
    assert str(repair(folder)).startswith("nothing was wrong; 10 samples")


def test_a_tar_cut_in_the_middle_keeps_its_first_samples(folder):
    cut(folder / "s-002.tar", read_index(folder / "s-002.index.arrow")["parts"][2].as_py()[0]["offset"] + 5)
    repair(folder)
    assert keys(folder)[-2:] == ["k0008", "k0009"]
    write_tar(folder / "t.tar", [pair(12)])
    assert adopt(folder).rows_per_shard.tolist() == [5, 3, 2, 1]
    assert verify(folder, full=True).sound


@pytest.mark.parametrize("over_http", [False, True])
def test_damaged_and_missing_tars_are_fetched_again(folder, copy, over_http):
    before = content(folder)
    damage(folder, 0, 3)
    sidecar_path(folder / "s-000.tar").unlink()
    (folder / "s-001.tar").unlink()
    cut(folder / "s-002.tar", 700)
    handler = functools.partial(_Quiet, directory=str(copy))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        report = repair(folder, copies=f"http://127.0.0.1:{server.server_port}" if over_http else str(copy))
        server.shutdown()
    assert [line.split(" from ")[0] for line in said(report)] == [
        "s-000.tar: fetched again",
        "s-000.tar: its sidecar was fetched again; its sidecar was missing.",
        "s-001.tar: fetched again",
        "s-002.tar: fetched again",
    ]
    assert said(report)[2].endswith("the tar was missing.")
    assert not report.failed
    assert content(folder) == before


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        """Say nothing."""


def test_a_copy_that_is_damaged_too(folder, copy):
    lost = damage(folder, 0, 3)
    damage(copy, 0, 1)
    report = repair(folder, copies=str(copy))
    assert [str(fault) for fault in report.failed] == [
        f"s-000.tar: the copy in {copy} could not be used: the copy is not the manifest's tar either."
    ]
    assert lost not in keys(folder)
    assert not list(folder.glob(".*.tmp"))


def test_what_cannot_be_mended_is_named_and_the_rest_is_mended(folder):
    (folder / "s-000.tar").unlink()
    sidecar_path(folder / "s-001.tar").unlink()
    write_tar(folder / "s-002.tar", [pair(50), pair(51)])
    write_tar(folder / "t.tar", [pair(0)])
    (folder / "u.index.arrow").touch()
    (folder / ".x.tar.tmp").touch()
    report = repair(folder)
    assert said(report) == [
        "s-001.tar: indexed again; its sidecar was missing.",
        ".x.tar.tmp: deleted: a killed command had left it.",
        "u.index.arrow: deleted: a sidecar without its tar.",
    ]
    assert [str(fault) for fault in report.failed] == [
        "s-000.tar: the tar is missing. Copy it here or give --from; or run `mmscale shards index` to go on without it.",
        "s-002.tar: no sample of the tar is as it was written. Give --from; or delete its sidecar and run `mmscale shards index`.",
        f"t.tar: the tar is not in the manifest; run `mmscale shards index {folder}` to take it in, or delete it.",
    ]
    assert str(report).splitlines()[-1].startswith("3 repaired, 3 could not be; 12 samples")


def test_tar_and_sidecar_both_unlike_the_manifest(folder):
    damage(folder, 0, 0)
    (folder / "s-000.index.arrow").write_bytes(b"x")
    report = repair(folder)
    assert [str(fault) for fault in report.failed] == [
        "s-000.tar: neither the tar nor its sidecar is the manifest's. Give --from, or run `mmscale shards index` to take the tar as it is."
    ]


def test_samples_that_do_not_decode_and_second_ones_of_a_key(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [Sample("cut", {"jpg": jpeg(0)[:300]}), Sample("latin", {"txt": b"caf\xe9"}), pair(1), pair(2)])
    entries = index_tar(tar)
    write_index(sidecar_path(tar), [*entries, entries[-1]])
    build_manifest(tmp_path)
    report = repair(tmp_path)
    assert [fault.key for fault in report.done] == ["cut", "latin", "k0002"]
    assert keys(tmp_path) == ["k0001", "k0002"]
    assert verify(tmp_path, full=True).sound


def test_a_manifest_edited_by_hand(folder, copy):
    sound = content(folder)
    path = folder / "manifest.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for change in ({"width_max": 9}, {"location": "../copy"}, {"rows": 4}):
        pq.write_table(table.from_pylist([{**rows[0], **change}, *rows[1:]], schema=table.schema), path)
        with pytest.raises(
            ShardError, match=r"does not match its own checksum: it was edited or damaged\. Rebuild it with `mmscale shards verify"
        ):
            verify(folder)
        assert said(repair(folder)) == ["manifest.parquet: made again from the sidecars; it was missing, edited or damaged."]
        assert content(folder) == sound
    path.unlink()
    assert said(repair(folder, copies=str(copy))) == [f"manifest.parquet: fetched again from {copy}; it was missing, edited or damaged."]
    assert content(folder) == sound


def test_a_version_is_mended_where_its_tars_lie(folder, tmp_path):
    new = tmp_path / "new"
    filter_data_set(folder, config(FilterVersionConfig, new, "where=[number>=1]", "processes=1"), progress=False)
    sound = content(new)
    sidecar_path(folder / "s-000.tar").unlink()
    damage(folder, 1, 1)
    assert [str(fault) for fault in repair(new).failed] == [
        f"s-000.tar: it lies in another data set: run `mmscale shards verify {new}/../d --full --repair` first.",
        f"s-001.tar: it lies in another data set: run `mmscale shards verify {new}/../d --full --repair` first.",
    ]
    assert content(new) == sound
    (new / "manifest.parquet").unlink()
    with pytest.raises(
        ShardError, match=r"Which samples this version leaves out is in its manifest alone: run the command again that origin\.json names"
    ):
        repair(new)
    with pytest.raises(ShardError, match=r"is in its manifest alone: run the command again that origin\.json names"):
        adopt(new)


def test_killed_at_any_moment_it_can_be_repeated(tmp_path):
    folder = make_data_set(tmp_path / "d", (6,) * 20)
    for shard in range(0, 20, 2):
        damage(folder, shard, shard % 6)
        sidecar_path(folder / f"s-{shard + 1:03d}.tar").unlink()
    whole = shutil.copytree(folder, tmp_path / "whole")
    expected = repair(whole)
    program = "from launcher.cli import main\nprint('ready', flush=True)\nmain()"
    for wait_s in (0.55, 0.65, 0.7, 0.75, 0.8, 0.9):
        words = [sys.executable, "-c", program, "shards", "verify", str(folder), "--full", "--repair"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(wait_s)
        process.kill()
        process.communicate()
    report = repair(folder)
    assert not report.failed
    assert report.digest == expected.digest
    assert content(folder) == content(whole)


def test_no_data_set_and_no_copies(tmp_path, folder):
    with pytest.raises(ShardError, match="There is no data set folder"):
        repair(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="There is no folder '/nowhere' to fetch from"):
        repair(folder, copies="/nowhere")
    with pytest.raises(ShardError, match=r"The copy 'gopher://x' is no store that can be read"):
        repair(folder, copies="gopher://x")


def test_keys_in_other_letters_by_pythons_own_tarfile(tmp_path):
    """Its names are in PAX headers; the plain ones before the parts hold question marks."""
    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, key in enumerate(("façade", "猫", "plain")):
            for ext, data in (("jpg", jpeg(number)), ("txt", key.encode())):
                member = tarfile.TarInfo(f"{key}.{ext}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    adopt(folder)
    assert keys(folder) == ["façade", "猫", "plain"]
    assert verify(folder, full=True).sound
    report = repair(folder)
    assert (said(report), report.failed) == ([], ())
