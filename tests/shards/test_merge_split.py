import errno
import os
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import configfile
from shards.errors import ConfigError, ShardError
from shards.index import adopt, index_tar
from shards.manifest import read_manifest
from shards.sample import Sample
from shards.sidecar import read_index
from shards.verify import verify
from shards.versions import merge
from shards.versions.filter import FilterVersionConfig, filter_data_set
from shards.versions.merge import MergeConfig, merge_data_sets
from shards.versions.split import SplitConfig, split_data_set
from tests.shards.recordings import clip, tone
from tests.shards.tars import jpeg, make_data_set, read_with_webdataset, write_tar
from tests.shards.versions import config, content, keys, samples


def split(base, out, *words):
    named = [word if word.split("=")[0] in ("by", "seed", "processes") else f"parts.{word}" for word in words]
    return split_data_set(base, config(SplitConfig, out, *named, "processes=1"), progress=False)


def merged(folders, out, *words):
    return merge_data_sets(folders, config(MergeConfig, out, *words, "processes=1"), progress=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("data") / "base", (40, 30, 30))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 2**40))
def test_a_split_is_a_partition(base, tmp_path_factory, weights, seed):
    out = tmp_path_factory.mktemp("split")
    parts = split(base, out, *(f"p{number}={weight / sum(weights)!r}" for number, weight in enumerate(weights)), f"seed={seed}")
    held = [key for part in parts for key in keys(part.out)]
    assert sorted(held) == sorted(keys(base))
    assert [part.rows for part in parts] == [len(keys(part.out)) for part in parts]


def test_a_split_depends_on_key_seed_and_fractions_alone(base, tmp_path):
    parts = split(base, tmp_path / "a", "train=0.8", "val=0.2")
    assert 65 <= parts[0].rows <= 92
    other = make_data_set(tmp_path / "other", (100,))
    again = split(other, tmp_path / "b", "train=0.8", "val=0.2")
    assert [keys(part.out) for part in again] == [keys(part.out) for part in parts]
    larger = split(base, tmp_path / "c", "train=0.9", "val=0.1")
    assert set(keys(larger[0].out)) > set(keys(parts[0].out))
    assert keys(split(base, tmp_path / "d", "train=0.8", "val=0.2", "seed=1")[0].out) != keys(parts[0].out)
    assert verify(parts[1].out, full=True).sound
    assert str(parts[1]).startswith(f"val: {parts[1].rows} samples; ")


def test_equal_fields_stay_together(tmp_path):
    rows = [Sample(f"q{number}", {"json": b'{"image": {"name": "%d"}}' % (number // 5)}) for number in range(100)]
    write_tar(tmp_path / "a.tar", rows[::2])
    write_tar(tmp_path / "b.tar", rows[1::2])
    adopt(tmp_path)
    train, val = split(tmp_path, tmp_path / "s", "train=0.5", "val=0.5", "by=image.name")
    groups = [{sample.fields()["image"]["name"] for sample in samples(part.out)} for part in (train, val)]
    assert groups[0] | groups[1] == {str(number) for number in range(20)}
    assert not groups[0] & groups[1]
    assert train.rows == 5 * len(groups[0])
    with pytest.raises(ShardError, match=r"a\.tar:q0 has no field 'image\.author', which `by` names"):
        split(tmp_path, tmp_path / "t", "train=0.5", "val=0.5", "by=image.author")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "at least two fractions must add up to 1; got none. Give for example train=0.9 val=0.1"),
        (["parts.sed=1"], "at least two fractions must add up to 1; got sed=1"),
        (["parts.train=0.9", "parts.val=0.2"], "must add up to 1; got train=0.9, val=0.2"),
        (["parts.train=1.0", "parts.val=0.0"], r"`parts\.val` must be over 0 and at most 1; got 0"),
        (["parts={../x: 1.0}"], "'../x' cannot be the name of a folder"),
    ],
)
def test_parts_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=message):
        configfile.load(SplitConfig, None, ["out=x", *words]).check()


def test_merging_links_and_makes_names_unique(tmp_path):
    one, two = make_data_set(tmp_path / "one"), make_data_set(tmp_path / "two", (2, 6))
    summary = merged([one, two], tmp_path / "all")
    assert keys(tmp_path / "all") == keys(one) + keys(two)
    assert sorted(path.name for path in (tmp_path / "all").glob("*.tar")) == [
        *(f"one-s-00{number}.tar" for number in range(3)),
        *(f"two-s-00{number}.tar" for number in range(2)),
    ]
    assert (tmp_path / "all" / "one-s-000.tar").samefile(one / "s-000.tar")
    assert summary.notes == ("8 samples have a key that an earlier data set has too, such as 'k0000', 'k0001', 'k0002'",)
    assert verify(tmp_path / "all", full=True).sound
    assert len(read_with_webdataset(sorted((tmp_path / "all").glob("*.tar")))) == 20
    assert merged([one, two], tmp_path / "all").digest == summary.digest


def test_merging_keeps_masks_and_undoes_a_split(base, tmp_path):
    parts = split(base, tmp_path / "s", "train=0.7", "val=0.3")
    summary = merged([part.out for part in parts], tmp_path / "all")
    assert summary.notes == ()
    assert sorted(keys(tmp_path / "all")) == sorted(keys(base))
    assert adopt(tmp_path / "all").digest == summary.digest


def test_different_parts_are_told(tmp_path):
    one = make_data_set(tmp_path / "one", (2,))
    (tmp_path / "two").mkdir()
    write_tar(tmp_path / "two" / "t.tar", [Sample("z", {"jpg": jpeg(3), "txt": b"z"})])
    adopt(tmp_path / "two")
    note = merged([one, tmp_path / "two"], tmp_path / "all").notes[0]
    assert note == f"the parts of samples differ: {one} has jpg, json, txt; {tmp_path / 'two'} has jpg, txt"
    assert (tmp_path / "all" / "s-000.tar").exists()


def _no_links(source, target):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    base = make_data_set(tmp_path / "base")
    monkeypatch.setattr(merge.os, "link", _no_links)
    merged([base], tmp_path / "copy")
    monkeypatch.undo()
    assert not (tmp_path / "copy" / "s-000.tar").samefile(base / "s-000.tar")
    assert verify(tmp_path / "copy", full=True).sound


def test_rewriting_leaves_out_what_masks_leave_out(base, tmp_path):
    filter_data_set(base, config(FilterVersionConfig, tmp_path / "f", "where=[number>=17]", "processes=1"), progress=False)
    summary = merged([tmp_path / "f"], tmp_path / "new", "rewrite=true", "rows_per_shard=20")
    assert samples(tmp_path / "new") == samples(tmp_path / "f")
    assert read_manifest(tmp_path / "new").rows_per_shard.tolist() == [20, 20, 20, 20, 3]
    assert summary.notes == ()
    tars = sorted((tmp_path / "new").glob("*.tar"))
    assert [sample["__key__"] for sample in read_with_webdataset(tars)] == keys(tmp_path / "f")
    sidecars = [tar.with_suffix(".index.arrow").read_bytes() for tar in tars]
    for tar in tars:
        tar.with_suffix(".index.arrow").unlink()
    adopt(tmp_path / "new")
    assert [tar.with_suffix(".index.arrow").read_bytes() for tar in tars] == sidecars
    merge_data_sets(
        [tmp_path / "f"], config(MergeConfig, tmp_path / "two", "rewrite=true", "rows_per_shard=20", "processes=2"), progress=False
    )
    assert content(tmp_path / "two") == content(tmp_path / "new")


def test_keys_of_one_new_shard_are_made_unique(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / f"{name}.tar", [Sample(key, {"txt": name.encode()}) for key in ("a", "a-2", "b")])
        adopt(tmp_path / name)
    summary = merged([tmp_path / "one", tmp_path / "two"], tmp_path / "all", "rewrite=true")
    assert keys(tmp_path / "all") == ["a", "a-2", "b", "a-3", "a-2-2", "b-2"]
    assert summary.notes[-1] == "3 keys got a number behind them, as their shard had them already"
    assert len(index_tar(tmp_path / "all" / "shard-000000.tar")) == 6


def test_a_killed_rewrite_is_finished_with_the_same_bytes(tmp_path):
    base = make_data_set(tmp_path / "base", (60,) * 10)
    words = [str(base), f"out={tmp_path / 'cut'}", "rewrite=true", "rows_per_shard=7", "processes=2"]
    program = "from launcher.cli import main\nmain()"
    for least in (1, 15):
        process = subprocess.Popen(
            [sys.executable, "-c", program, "shards", "merge", *words], stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "cut").glob("*.arrow"))) < least and time.monotonic() < deadline:
            time.sleep(0.002)
        everyone = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, 9)
        process.wait()
        psutil.wait_procs(everyone, timeout=60)  # until then its half-written files count as somebody's
    merged([base], tmp_path / "cut", "rewrite=true", "rows_per_shard=7")
    merged([base], tmp_path / "whole", "rewrite=true", "rows_per_shard=7")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_merge_errors(tmp_path):
    base = make_data_set(tmp_path / "base")
    with pytest.raises(ConfigError, match="There is nothing to merge"):
        merged([], tmp_path / "x")
    with pytest.raises(ConfigError, match="The same data set is given 2 times"):
        merged([base, base], tmp_path / "x")
    with pytest.raises(ConfigError, match="`rows_per_shard` must be at least 1; got 0"):
        merged([base], tmp_path / "x", "rows_per_shard=0")
    write_tar(base / "s-001.tar", [Sample("other", {"txt": b"x"})])
    with pytest.raises(ShardError, match=r"s-001\.tar' is not the one in its manifest"):
        merged([base], tmp_path / "y")
    deep = tmp_path / "deep"
    deep.mkdir()
    write_tar(deep / "d.tar", [Sample(f"{'f' * 60}/{'k' * 94}", {"txt": b"1"}), Sample("g", {"txt": b"2"})])
    adopt(deep)
    merged([deep], tmp_path / "z", "rewrite=true")
    assert keys(tmp_path / "z") == keys(deep)


def test_rewriting_keeps_what_is_known_of_sound_and_clips(tmp_path):
    (tmp_path / "base").mkdir()
    write_tar(tmp_path / "base" / "a.tar", [Sample("s", {"wav": tone(0.5, 8000)}), Sample("v", {"mp4": clip(6)})])
    adopt(tmp_path / "base")
    merged([tmp_path / "base"], tmp_path / "new", "rewrite=true")
    names = ["duration_s", "sample_rate", "frames", "width"]
    (old,), (new,) = (sorted(folder.glob("*.index.arrow")) for folder in (tmp_path / "base", tmp_path / "new"))
    assert read_index(new).select(names).to_pylist() == read_index(old).select(names).to_pylist()
    assert read_index(new)["sample_rate"][0].as_py() == 8000
