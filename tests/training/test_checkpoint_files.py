import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmscale.checkpoint import manifest
from mmscale.checkpoint.find import committed, name_of, resolve, set_aside, step_of
from mmscale.checkpoint.manifest import find_fault, is_pickle
from mmscale.checkpoint.retention import pin, retain
from mmscale.errors import CheckpointError
from mmscale.recovery_config import CheckpointConfig
from mmscale.run_folder import RunFolder, append_line, drop_torn_line, keep_lines_up_to, read_lines


def make(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / name_of(step)
    (folder / "state").mkdir(parents=True)
    files = [folder / "run.json", folder / "state" / "a.safetensors"]
    for path in files:
        path.write_text(f"{path.name} {step}" * 50)
    (folder / manifest.NAME).write_text(manifest.to_json([manifest.describe_file(folder, p) for p in files], step))
    return folder


def test_the_newest_and_its_name(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    make(checkpoints, 5)
    newest = make(checkpoints, 1234567890)
    (checkpoints / ".tmp-step-00000009.ab").mkdir()
    (checkpoints / "step-00000011").mkdir()  # never committed: no manifest
    assert [step_of(p) for p in committed(checkpoints)] == [5, 1234567890]
    assert resolve(tmp_path) == newest


def spoil(folder: Path, how: str) -> None:
    path = folder / "state" / "a.safetensors"
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
        ("missing", "state/a.safetensors is missing"),
        ("truncated", r"state/a.safetensors has \d+ bytes instead of \d+"),
        ("flipped", "state/a.safetensors does not match its sha256"),
        ("manifest", "is damaged"),
    ],
)
def test_a_bad_checkpoint_is_named_set_aside_and_the_one_before_used(
    tmp_path: Path, how: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "checkpoints"
    good = make(checkpoints, 1)
    for _ in range(2):
        bad = make(checkpoints, 2)
        spoil(bad, how)
        with pytest.raises(CheckpointError, match=message):
            resolve(bad)
        assert resolve(tmp_path) == good
        fault = find_fault(bad)
        assert fault is not None
        with caplog.at_level(logging.WARNING, logger="mmscale.checkpoint.find"):
            set_aside(bad, fault)
        assert f"step-00000002 is damaged: {fault}" in caplog.text
        assert committed(checkpoints) == [good]
    assert (checkpoints / ".bad-step-00000002").is_dir()
    assert (checkpoints / ".bad-step-00000002.1").is_dir()


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


def test_retention(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 8):
        make(run.checkpoints, step)
        append_line(run.evaluations, {"step": step, "accuracy": 0.9 if step == 3 else 0.1 * step})
    pin(run.checkpoints / name_of(1))
    retain(run, CheckpointConfig(keep=0))
    assert len(committed(run.checkpoints)) == 7
    retain(run, CheckpointConfig(keep=2, keep_every=4, best="accuracy"))
    assert [step_of(p) for p in committed(run.checkpoints)] == [1, 3, 4, 6, 7]
    pin(run.checkpoints / name_of(1), pinned=False)
    assert find_fault(run.checkpoints / name_of(1)) is None
    retain(run, CheckpointConfig(keep=2))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [name_of(6), name_of(7)]


@pytest.mark.parametrize("content", [b"PK\x03\x04zip", b"\x80\x04\x95pickle"])
def test_pickles_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    folder = make(tmp_path, 1)
    (folder / "state" / "a.safetensors").write_bytes(content)
    files = [manifest.describe_file(folder, p) for p in (folder / "run.json", folder / "state" / "a.safetensors")]
    (folder / manifest.NAME).write_text(manifest.to_json(files, 1))
    with pytest.raises(CheckpointError, match=r"state/a\.safetensors is a pickle, which can run code when it is loaded"):
        resolve(folder)


def test_manifests_that_are_not_ours(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    entry = manifest.describe_file(folder, folder / "run.json")
    (folder / manifest.NAME).write_text(manifest.to_json([replace(entry, path="../run.json")], 1))
    assert find_fault(folder) == "../run.json lies outside of the checkpoint"
    (folder / manifest.NAME).write_text('{"version": 1, "step": 1, "files": []}')
    with pytest.raises(CheckpointError, match="is of version 1; this mmscale reads version 2"):
        resolve(folder)


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


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(3)}, path, metadata={"x": "y" * (length - 80)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert not is_pickle(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=length >> 8))
    assert is_pickle(path)
