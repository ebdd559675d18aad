"""What others' tars, a careless copy and a stern system may present: each gets its one paragraph."""

import io
import os
import shutil
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.index import adopt, index_tar
from shards.manifest import read_manifest
from shards.read import ShardReader
from shards.repair import repair
from shards.verify import verify
from tests.shards.tars import make_data_set, pair, write_tar

NOBODY = 65534


def tar_of(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/etc/passwd.txt", "an absolute name"),
        ("../up.txt", r"'\.\.' in its name"),
        ("a/../../b.txt", r"'\.\.' in its name"),
        ("a/..", r"'\.\.' in its name"),
    ],
)
def test_names_that_lead_out_of_a_folder(tmp_path, name, kind):
    tar_of(tmp_path / "a.tar", "good.txt", name)
    with pytest.raises(ShardError, match=rf"a\.tar:{name}: the tar .* holds a member with {kind}, which would be unpacked outside"):
        index_tar(tmp_path / "a.tar")
    with pytest.raises(ShardError, match=r"1 of 1 tars cannot be used\. a\.tar:"):
        adopt(tmp_path)
    assert not (tmp_path / "manifest.parquet").exists()


def test_names_that_only_look_like_it(tmp_path):
    assert [entry.key for entry in index_tar(tar_of(tmp_path / "a.tar", "./a.txt", "b..c.txt", "..d/e.txt"))] == ["./a", "b", "..d/e"]


def test_a_key_of_two_samples(tmp_path):
    write_tar(tmp_path / "a.tar", [pair(0), pair(1), pair(0)])
    with pytest.raises(ShardError, match=r"a\.tar:k0000: the tar .* holds two samples of this key, at bytes 512 and \d+: .*unique keys"):
        index_tar(tmp_path / "a.tar")


def test_a_sample_whose_parts_are_not_neighbours(tmp_path):
    tar_of(tmp_path / "a.tar", "a.jpg", "b.jpg", "a.txt", "b.txt")
    with pytest.raises(
        ShardError, match=r"a\.tar:a: the tar .* its parts apart from each other: jpg at byte 512, txt at byte 2560\..*--sort=name"
    ):
        index_tar(tmp_path / "a.tar")


def test_a_manifest_of_another_kind(tmp_path):
    folder = make_data_set(tmp_path / "d")
    (folder / "manifest.parquet").write_bytes((folder / "s-000.index.arrow").read_bytes())
    with pytest.raises(ShardError, match=r"is not a manifest: .*Rebuild it with `mmscale shards verify .* --full --repair`"):
        read_manifest(folder)


@contextmanager
def as_a_user():
    """Work as somebody whom permissions bind, in a folder that he may enter; root is above them."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o777)
        shutil.rmtree(folder)


def test_permission_denied_for_a_tar():
    with as_a_user() as folder:
        base = make_data_set(folder / "d")
        (base / "s-001.tar").chmod(0)
        problem = "s-001.tar: it cannot be read: Permission denied. Give this user the right to read it, or mend the disk."
        assert [str(fault) for fault in verify(base, full=True).faults] == [problem]
        assert "s-001.tar: cannot be read or replaced: [Errno 13] Permission denied" in str(repair(base).failed[0])
        with pytest.raises(ShardError, match=r"s-001\.tar.*cannot be read, 4 times tried: .*Permission denied"):
            ShardReader(base)[1, 0]
        (base / "s-001.index.arrow").unlink()
        with pytest.raises(ShardError, match=r"The tar .*s-001\.tar' cannot be read: Permission denied\. Give this user the right to"):
            adopt(base)


def test_permission_denied_for_a_manifest_a_sidecar_and_folders():
    with as_a_user() as folder:
        base = make_data_set(folder / "d")
        (base / "s-002.index.arrow").chmod(0)
        assert "s-002.tar: it cannot be read: Permission denied" in str(verify(base))
        (base / "manifest.parquet").chmod(0)
        with pytest.raises(ShardError, match=r"manifest\.parquet' cannot be read: Permission denied\. Give this user the right to read it"):
            read_manifest(base)
        (base / "manifest.parquet").chmod(0o666)
        (base / "s-002.index.arrow").unlink()
        base.chmod(0o555)
        with pytest.raises(ShardError, match=r"or its sidecar cannot be written: \[Errno 13\] Permission denied"):
            adopt(base)
        base.chmod(0)
        with pytest.raises(ShardError, match="cannot be read: Permission denied"):
            read_manifest(base)


def test_a_data_set_that_may_only_be_read_is_read():
    with as_a_user() as folder:
        base = make_data_set(folder / "d")
        for path in base.iterdir():
            path.chmod(0o444)
        base.chmod(0o555)
        assert ShardReader(base)[2, 3] == pair(11)
        assert verify(base, full=True).sound
