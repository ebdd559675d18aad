import logging
from pathlib import Path

import pytest

from mmscale.checkpoint import manifest
from mmscale.checkpoint.commit import retain
from mmscale.checkpoint.find import committed, name_of, newest_good, resolve, step_of
from mmscale.errors import CheckpointError
from mmscale.run_folder import append_line, drop_torn_line, keep_lines_up_to, read_lines


def make(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / name_of(step)
    (folder / "state").mkdir(parents=True)
    files = [folder / "run.json", folder / "state" / "a.pt"]
    for path in files:
        path.write_text(f"{path.name} {step}" * 50)
    (folder / manifest.NAME).write_text(manifest.to_json([manifest.describe_file(folder, p) for p in files], step))
    return folder


def test_newest_good_and_its_names(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "checkpoints") is None
    make(tmp_path, 5)
    newest = make(tmp_path, 1234567890)
    (tmp_path / ".tmp-step-00000009.ab").mkdir()
    (tmp_path / "step-00000011").mkdir()  # never committed: no manifest
    assert [step_of(p) for p in committed(tmp_path)] == [5, 1234567890]
    assert newest_good(tmp_path) == newest


def spoil(folder: Path, how: str) -> None:
    path = folder / "state" / "a.pt"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(bytes(content))
    else:
        (folder / manifest.NAME).write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "state/a.pt is missing"),
        ("truncated", r"state/a.pt has \d+ bytes instead of \d+"),
        ("flipped", "state/a.pt does not match its sha256"),
        ("manifest", "is damaged"),
    ],
)
def test_a_bad_checkpoint_is_named_set_aside_and_the_one_before_used(
    tmp_path: Path, how: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = make(tmp_path, 1)
    spoil(make(tmp_path, 2), how)
    with caplog.at_level(logging.WARNING, logger="mmscale.checkpoint.find"):
        assert newest_good(tmp_path) == good
    assert "step-00000002 is damaged" in caplog.text
    assert (tmp_path / ".bad-step-00000002").is_dir()
    assert committed(tmp_path) == [good]
    spoil(make(tmp_path, 2), how)
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / "step-00000002")


def test_resolve_tells_what_is_no_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(run / "checkpoints", 3)
    assert resolve(run) == run / "checkpoints" / "step-00000003"
    with pytest.raises(CheckpointError, match=r"does not exist\. Give a run folder"):
        resolve(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no MANIFEST.json\. Give a run folder"):
        resolve(tmp_path)
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no committed checkpoint yet"):
        resolve(tmp_path / "new")


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    retain(tmp_path, 0)
    assert len(committed(tmp_path)) == 4
    retain(tmp_path, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


def test_json_lines_survive_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_lines(path)] == [1, 2, 3]
    drop_torn_line(path)
    append_line(path, {"step": 4})
    assert [r["step"] for r in read_lines(path)] == [1, 2, 3, 4]
    keep_lines_up_to(path, 2)
    assert [r["step"] for r in read_lines(path)] == [1, 2]
