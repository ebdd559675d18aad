"""Saving as a run does it: in the background, on a disk that fails, by a user who takes the weights elsewhere."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.checkpoint_commands import average_checkpoints, export_checkpoint, pin_checkpoint
from mmscale.checkpoint import manifest
from mmscale.checkpoint.find import committed, name_of, resolve
from mmscale.checkpoint.model_folder import open_model
from mmscale.checkpoint.reader import StateReader
from mmscale.errors import CheckpointError
from mmscale.hooks.checkpoint import best_interval_s, mttf_hours
from mmscale.model import MMScaleModel
from tests.training.alone import Alone
from tests.training.runs import count_lines, losses, records


def tensor_files(run: Path) -> dict[tuple[str, str], str]:
    """(checkpoint, file) -> sha256 of everything but run.json, which names the run."""
    found = {(f.name, e.path): e.sha256 for f in committed(run / "checkpoints") for e in manifest.read_manifest(f)}
    return {key: value for key, value in found.items() if key[1] != "run.json"}


def test_a_save_in_the_background_has_the_same_bytes(alone: Alone, stage: Path, tmp_path: Path, tiny_run: Path) -> None:
    code, out, err = alone(stage, f"run={tmp_path}/r", "checkpoint.every=4", "checkpoint.keep=0", "checkpoint.background=true")
    assert code == 0, out + err
    assert tensor_files(tmp_path / "r") == tensor_files(tiny_run)
    assert {name for name, _ in tensor_files(tiny_run)} == {name_of(step) for step in (4, 8, 12)}
    assert "one every " in out


def test_a_run_goes_on_under_another_stage(alone: Alone, stage: Path, tmp_path: Path, tiny_run: Path) -> None:
    """The same command with another `zero.stage` (tests/checkpoint/test_elastic.py changes the ranks too)."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "checkpoints" / name_of(12))
    code, out, err = alone(stage, f"run={run}", "zero.stage=3")
    assert code == 0, out + err
    assert "step 8, 128 samples seen; every tensor compared" in out
    assert "the topology has changed (zero.stage was 1, now 3)" in out
    for (step, mine), (_, theirs) in zip(losses(run), losses(tiny_run), strict=True):
        assert mine == (theirs if step <= 8 else pytest.approx(theirs, abs=1e-4))


@pytest.mark.parametrize("background", ["true", "false"])
def test_failing_saves_leave_training_on_until_there_are_too_many(alone: Alone, stage: Path, tmp_path: Path, background: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    words = [f"run={run}", "checkpoint.every=3", "checkpoint.max_failures=2", f"checkpoint.background={background}"]
    code, out, err = alone(stage, *words)
    assert code == 1
    assert out.count("ALERT The checkpoint of step 3 was not committed: [Errno 17] File exists") == 1
    assert "(2 of 2 failures in a row)" in out
    assert "The one before it stays the newest. It was failure" in err
    assert 6 <= count_lines(run) <= 9  # in the background, the failure of step 6 is seen a step or more later


def test_export_and_average(tiny_run: Path, tmp_path: Path) -> None:
    newest = resolve(tiny_run)
    export_checkpoint(tiny_run, tmp_path / "one", shard_gib=5.0, dtype="fp32", average=True)
    export_checkpoint(tiny_run, tmp_path / "many", shard_gib=2e-5, dtype="fp32", average=True)
    export_checkpoint(tiny_run, tmp_path / "half", shard_gib=5.0, dtype="bf16", average=True)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    own = open_model(newest).state_dict()
    for name in ("one", "many"):
        theirs = MMScaleModel.from_pretrained(tmp_path / name).state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[k], theirs[k]) for k in own)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(half[k], own[k].bfloat16()) for k in half)
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(tiny_run, tmp_path / "one", shard_gib=5.0, dtype="fp32", average=True)
    average_checkpoints(tiny_run, tmp_path / "mean", 3)
    assert manifest.find_fault(tmp_path / "mean") is None
    readers = [StateReader(f) for f in committed(tiny_run / "checkpoints")]
    for name, value in open_model(resolve(tmp_path / "mean")).named_parameters():
        mean = torch.stack([r.whole("master", name) for r in readers]).double().mean(0).float()
        assert torch.equal(value.detach(), mean)
    with pytest.raises(CheckpointError, match=r"has 3 checkpoints, and 4 are asked for"):
        average_checkpoints(tiny_run, tmp_path / "more", 4)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 5\. It has: step-00000004, step-00000008, step-00000012"):
        pin_checkpoint(tiny_run, 5, pinned=True)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.made,))


@pytest.mark.parametrize("zipped", [False, True])
def test_nothing_in_a_checkpoint_is_unpickled(tiny_run: Path, tmp_path: Path, zipped: bool) -> None:
    """Even a manifest that vouches for it does not make a pickle be loaded; nor does reading past the manifest."""
    checkpoint = tmp_path / name_of(12)
    (checkpoint / "state").mkdir(parents=True)
    source = resolve(tiny_run)
    (checkpoint / "state" / "index.json").write_bytes((source / "state" / "index.json").read_bytes())
    weights = checkpoint / "state" / "rank-00000.safetensors"
    if zipped:
        torch.save(Evil(tmp_path / "made"), weights)
    else:
        weights.write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    files = [manifest.describe_file(checkpoint, p) for p in (weights, checkpoint / "state" / "index.json")]
    (checkpoint / manifest.NAME).write_text(manifest.to_json(files, 12))
    with pytest.raises(CheckpointError, match=r"state/rank-00000\.safetensors is a pickle, which can run code"):
        resolve(checkpoint)
    reader = StateReader(checkpoint)
    with pytest.raises(CheckpointError, match="is a pickle, not a safetensors file"):
        reader.read(*next(iter(reader.index.names())))
    assert not (tmp_path / "made").exists()


def test_index_that_lacks_elements_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    content = json.loads((resolve(tiny_run) / "state" / "index.json").read_text())
    name = next(iter(content["ranges"]))
    content["ranges"][name][0][2] -= 1
    (tmp_path / "state" / "index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"is not whole: \d+ of \d+ elements are in the files"):
        StateReader(tmp_path)


def test_best_interval() -> None:
    assert best_interval_s(2.0, 3600.0) == 120.0
    assert [mttf_hours(None, ranks) for ranks in (1024, 8)] == [7.9, pytest.approx(1011.2)]
    assert mttf_hours(24.0, 8) == 24.0


def test_the_second_save_advises_once_and_stalls_are_in_the_metrics(alone: Alone, stage: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = alone(stage, f"run={run}", "train.steps=6", "checkpoint.every=2", "checkpoint.mttf_hours=3")
    assert code == 0, out + err
    lines = out.splitlines()
    at = [i for i, line in enumerate(lines) if "a checkpoint stalls training" in line]
    assert len(at) == 1
    assert "committed the checkpoint of step 4 in" in lines[at[0] - 1]
    found = re.fullmatch(
        r"a checkpoint stalls training for ([\d.]+) s; with a failure every 3 h, one every (\d+) s costs least: checkpoint\.every=(\d+) "
        r"\(now 2\)",
        lines[at[0]],
    )
    assert found is not None, lines[at[0]]
    assert int(found[3]) > 2
    stalls = [r["save_stall_s"] for r in records(run / "metrics.jsonl")]
    assert [s > 0 for s in stalls] == [False, False, True, False, True, False]
    assert float(found[1]) == pytest.approx(stalls[4], abs=0.006)  # of the second save, in the line of the step after it
    assert float(found[2]) == pytest.approx(best_interval_s(stalls[4], 3 * 3600), abs=0.6)
