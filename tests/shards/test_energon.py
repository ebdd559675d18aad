import importlib.util
import io
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from shards.energon import write_energon
from shards.errors import ShardError
from shards.index import adopt
from shards.manifest import read_manifest
from shards.versions.filter import FilterVersionConfig, filter_data_set
from tests.shards.tars import make_data_set, pair, write_tar
from tests.shards.versions import config

REPO = Path(__file__).resolve().parents[2]


def awkward_tar(path, format):
    """Names too long for one header, a time that takes a pax header, members that are no parts."""
    with tarfile.open(path, "w", format=format) as tar:
        for name in (
            "dir",
            "dir/a.jpg",
            "dir/a.left.txt",
            "__meta__",
            ".hidden",
            "x" * 150 + "/b.JPG",
            "x" * 150 + "/b.json",
            "c.txt",
            "README",
        ):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "dir" else tarfile.REGTYPE
            member.size = 0 if name == "dir" else 700
            member.mtime = 0.5 if format == tarfile.PAX_FORMAT else 0
            tar.addfile(member, io.BytesIO(bytes(700)))
    return path


def offsets(path):
    data = path.read_bytes()
    return list(struct.unpack(f"<{len(data) // 8}Q", data))


@pytest.mark.parametrize(
    ("format", "expected"),
    [(tarfile.GNU_FORMAT, [512, 6656, 11776, 14848]), (tarfile.PAX_FORMAT, [1536, 11776, 16896, 22016])],
)
def test_offsets_are_those_of_energons_own_indexer(tmp_path, format, expected):
    """The numbers were written by `energon prepare` of release 7.4.1 over the same tars."""
    awkward_tar(tmp_path / "a.b.tar", format)
    write_energon(adopt(tmp_path))
    assert offsets(tmp_path / "a.b.tar.idx") == expected


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-energon is not installed")
def test_every_byte_is_energons_own(tmp_path):
    folder = make_data_set(tmp_path / "d")
    awkward_tar(folder / "z.tar", tarfile.PAX_FORMAT)
    write_energon(adopt(folder))
    ours = {path.name: path.read_bytes() for path in [*folder.glob("*.idx"), folder / ".nv-meta" / ".info.json"]}
    names = sorted(path.name for path in folder.glob("*.tar"))
    code = (
        "import sys; from megatron.energon.flavors.webdataset import BaseWebdatasetFactory as F\n"
        "F.prepare_dataset(sys.argv[1], sys.argv[2:], split_parts_ratio=[('train', 1.0)], workers=1)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), *names], check=True)
    assert ours == {path.name: path.read_bytes() for path in [*folder.glob("*.idx"), folder / ".nv-meta" / ".info.json"]}


def test_the_meta_folder_names_all_shards(tmp_path):
    folder = make_data_set(tmp_path / "d", (2, 1))
    seen = []
    write_energon(adopt(folder), progress=lambda done, total, name: seen.append((done, total, name)))
    meta = folder / ".nv-meta"
    assert json.loads((meta / ".info.json").read_text())["shard_counts"] == {"s-000.tar": 2, "s-001.tar": 1}
    assert yaml.safe_load((meta / "split.yaml").read_text())["split_parts"] == {"train": ["s-000.tar", "s-001.tar"], "val": [], "test": []}
    assert yaml.safe_load((meta / "dataset.yaml").read_text()) == {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    assert seen == [(1, 2, "s-000.tar"), (2, 2, "s-001.tar")]
    assert adopt(folder).rows == 3  # what was added is in nobody's way


def test_what_energon_refuses_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", [pair(0), pair(1)])
    write_tar(tmp_path / "b.tar", [pair(1)])
    manifest = adopt(tmp_path)
    with pytest.raises(ShardError, match=r"b\.tar:k0001: this key is in 'a\.tar' too.*source=webdataset"):
        write_energon(manifest)
    assert not (tmp_path / ".nv-meta").exists()
    write_tar(tmp_path / "b.tar", [])
    (tmp_path / "b.index.arrow").unlink()
    with pytest.raises(ShardError, match=r"'b\.tar' has no samples, which Energon refuses"):
        write_energon(adopt(tmp_path))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ShardError, match=r"a\.tar' cannot be read"):
        write_energon(manifest)


def test_hidden_files_that_energon_takes_for_samples_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("dir/a.txt", "dir/._a.txt"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match=r"a\.tar' has 1 samples, and Energon would find 2: it takes hidden files"):
        write_energon(adopt(tmp_path))


def test_a_version_with_a_row_mask_is_refused(tmp_path):
    folder = make_data_set(tmp_path / "d", (5,))
    filter_data_set(folder, config(FilterVersionConfig, tmp_path / "v", "where=[number>2]"))
    with pytest.raises(ShardError, match=r"leaves out rows .* Write it densely first: `mmscale shards merge .*v out=NEW rewrite=true`"):
        write_energon(read_manifest(tmp_path / "v"))
