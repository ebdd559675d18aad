"""kill -9 at every step of a save, on either rank, and disks that are full: the newest committed checkpoint is whole and is what it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint.commit import LATEST, find_lack
from mmscale.checkpoint.find import committed, name_of, resolve, step_of
from mmscale.checkpoint.reader import StateReader
from tests.checkpoint.crashing import SIZE, save
from tests.checkpoint.forks import Forks


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A run with checkpoints of steps 1 and 2. Not to be changed: copy it."""
    run = tmp_path_factory.mktemp("crash") / "run"
    for step in (1, 2):
        assert forks(save, 2, run=str(run), step=step)[0] == [0, 0]
    return run


@pytest.fixture
def run(tmp_path: Path, two_checkpoints: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    return copied(two_checkpoints, tmp_path / "run")


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint, after a look at its values."""
    folder = resolve(run)
    step = step_of(folder)
    assert torch.equal(StateReader(folder).whole("master", "weight"), torch.full((SIZE,), float(step)))
    return step


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_every_step(tmp_path: Path, two_checkpoints: Path, forks: Forks, victim: int) -> None:
    undisturbed = copied(two_checkpoints, tmp_path / "undisturbed")
    codes, results = forks(save, 2, run=str(undisturbed), step=3)
    steps = results[victim]["steps"]
    assert codes == [0, 0]
    assert newest_step(undisturbed) == 3
    assert {"write fd", "fsync fd"} <= set(steps)
    if victim == 0:  # the named points of the protocol: attempt, manifest, commit, hint, pruning
        assert {f"rename {name_of(3)}", "replace MANIFEST.json", "replace index.json", f"replace {LATEST}", "unlink run.json"} <= set(steps)
    for at in range(len(steps)):
        run = copied(two_checkpoints, tmp_path / f"{at}")
        codes, _ = forks(save, 2, run=str(run), step=3, victim=victim, at=at)
        assert codes[victim] == -9, (at, steps[at])
        committed_before = f"rename {name_of(3)}" in steps[:at]
        assert newest_step(run) == (3 if committed_before else 2), (at, steps[at])
        assert forks(save, 2, run=str(run), step=4)[0] == [0, 0]  # what the killed one left is no obstacle, and is gone
        assert newest_step(run) == 4
        assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")) == []
        shutil.rmtree(run)


def test_file_that_cannot_be_written_is_reported_on_every_rank_and_its_space_given_back(run: Path, forks: Forks) -> None:
    codes, results = forks(save, 2, run=str(run), step=3, largest=1000)
    assert codes == [0, 0]
    for result in results:
        assert result["error"].startswith(
            "The checkpoint of step 3 was not committed: rank 0: [Errno 27] File too large; rank 1: [Errno 27]"
        )
        assert result["error"].endswith("The one before it stays the newest.")
    assert not list((run / "checkpoints").glob(".*"))
    assert newest_step(run) == 2


def test_space_is_looked_for_before(tmp_path: Path) -> None:
    assert find_lack(tmp_path, 1000, 2) is None
    lack = find_lack(tmp_path, 1 << 60, 2)
    assert lack is not None
    assert "MiB free and 1,099,511,627,840 MiB are needed" in lack
    assert find_lack(Path("/proc"), 1 << 60, 2) is None  # a file system that does not tell its size


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("spoil", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", ["state/rank-00001.safetensors", "state/index.json"])
def test_damaged_file(run: Path, forks: Forks, spoil: Callable[[Path], None], file: str) -> None:
    spoil(run / "checkpoints" / name_of(2) / file)
    assert newest_step(run) == 1


def test_two_damaged_in_a_row_and_an_empty_hint(run: Path, forks: Forks) -> None:
    assert (run / "checkpoints" / LATEST).read_text() == name_of(2) + "\n"
    assert forks(save, 2, run=str(run), step=3)[0] == [0, 0]
    (run / "checkpoints" / LATEST).write_text("")
    assert [step_of(f) for f in committed(run / "checkpoints")] == [2, 3]
    assert forks(newest, 2, run=str(run))[1] == [3, 3]
    flip(run / "checkpoints" / name_of(3) / "state" / "rank-00001.safetensors")
    assert forks(newest, 2, run=str(run))[1] == [2, 2]
    truncate(run / "checkpoints" / name_of(2) / "state" / "rank-00000.safetensors")
    assert forks(newest, 2, run=str(run))[1] == [0, 0]
    assert len(list((run / "checkpoints").glob(".bad-*"))) == 2


def newest(run: str) -> int:
    """What the ranks agree to go on from (runs on every rank); 0 for nothing."""
    import torch.distributed as dist

    from mmscale.checkpoint.agree import agree_on_newest

    folder = agree_on_newest(Path(run) / "checkpoints", dist.group.WORLD)  # type: ignore[arg-type]
    return 0 if folder is None else step_of(folder)
