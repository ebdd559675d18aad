"""File systems of a few megabytes that are full, have no inodes left, or cannot be written: mounted for real, so as root alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.direct_file import BUFFER_BYTES
from mmscale.checkpoint.find import resolve, step_of
from mmscale.checkpoint.reader import StateReader
from tests.checkpoint.filling import SIZE, save_while_filling
from tests.checkpoint.forks import Forks
from tests.checkpoint.test_crash import newest
from tests.checkpoint.test_direct_file import write

pytestmark = pytest.mark.cluster


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """80 MiB and 90 inodes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m,nr_inodes=90", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def assert_step(run: Path, forks: Forks, step: int) -> None:
    """The newest checkpoint is of this step, and the ranks go on from it."""
    folder = resolve(run)
    assert step_of(folder) == step
    assert torch.equal(StateReader(folder).whole("master", "weight"), torch.full((SIZE,), float(step)))
    assert forks(newest, 2, run=str(run))[1] == [step, step]


@pytest.mark.parametrize("filler", [0, 1])
def test_a_disk_that_fills_up_during_a_save(disk: Path, forks: Forks, filler: int) -> None:
    run = disk / "run"
    assert forks(save_while_filling, 2, run=str(run), step=1)[1] == [None, None]
    _, told = forks(save_while_filling, 2, run=str(run), step=2, filler=filler)
    assert told[0] == told[1]
    assert told[0].startswith("The checkpoint of step 2 was not committed: rank ")
    assert "[Errno 28] No space left on device" in told[0]
    assert not list((run / "checkpoints").glob(".*"))
    assert_step(run, forks, 1)
    _, told = forks(save_while_filling, 2, run=str(run), step=3)
    assert "MiB free and 68 MiB are needed; delete something there. The one before it stays the newest." in told[0]
    (run / "filler").unlink()
    assert forks(save_while_filling, 2, run=str(run), step=4)[1] == [None, None]
    assert_step(run, forks, 4)


def test_a_disk_without_inodes(disk: Path, forks: Forks) -> None:
    run = disk / "run"
    assert forks(save_while_filling, 2, run=str(run), step=1)[1] == [None, None]
    for number in range(20):
        (disk / f"{number}").touch()
    _, told = forks(save_while_filling, 2, run=str(run), step=2)
    assert told[0] == told[1]
    assert " free inodes and 66 are needed; delete files there" in told[0]
    assert_step(run, forks, 1)


def test_a_disk_that_cannot_be_written(disk: Path, forks: Forks) -> None:
    run = disk / "run"
    assert forks(save_while_filling, 2, run=str(run), step=1)[1] == [None, None]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    _, told = forks(save_while_filling, 2, run=str(run), step=2)
    assert told[0] == told[1]
    assert "[Errno 30] Read-only file system" in told[0]
    assert_step(run, forks, 1)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert forks(save_while_filling, 2, run=str(run), step=3)[1] == [None, None]
    assert_step(run, forks, 3)


def test_a_file_system_without_direct_writes_and_size(tmp_path: Path, forks: Forks) -> None:
    """ramfs refuses O_DIRECT, and leaves the file that it has made; it says that it has 0 blocks, none of them free."""
    folder = tmp_path / "ramfs"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "ramfs", "ramfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        content = os.urandom(BUFFER_BYTES + 12_345)
        assert write(folder / "f", content, 1_000_003) == (len(content), hashlib.sha256(content).hexdigest())
        assert (folder / "f").read_bytes() == content
        assert os.statvfs(folder).f_blocks == 0
        assert forks(save_while_filling, 2, run=str(folder / "run"), step=1)[1] == [None, None]
        assert_step(folder / "run", forks, 1)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
