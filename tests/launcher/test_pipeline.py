"""A pipeline is a list of stages in order; one that is run again goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import pipeline_run
from launcher.pipeline import Stage, load_pipeline
from launcher.pipeline_run import command_of, pending, table
from mmscale.errors import RunError
from shards.errors import ConfigError
from tests.launcher.launching import MMSCALE, REPO
from tests.shards.tars import make_data_set

PIPELINE = """
folder: FOLDER
stages:
  - name: filter
    after: [split]
    grid: {part: [train, val]}
    command: shards filter {folder}/s/{part} out={folder}/f-{part} min_side=1 processes=1
  - {name: split, command: "shards split BASE out={folder}/s train=0.5 val=0.5 processes=1"}
  - {name: merge, after: [filter], command: "shards merge {folder}/f-train {folder}/f-val out={folder}/m rewrite=true"}
"""


def write(folder: Path, text: str = PIPELINE) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text.replace("FOLDER", str(folder / "p")).replace("BASE", str(folder / "base")))
    return path


def run(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MMSCALE, "pipeline", str(path), *words], cwd=REPO, capture_output=True, text=True, check=False)


def test_stages_are_put_in_order_and_grids_taken_apart(tmp_path: Path) -> None:
    _, stages = load_pipeline(write(tmp_path))
    assert [(stage.name, stage.after) for stage in stages] == [
        ("split", ()),
        ("filter-train", ("split",)),
        ("filter-val", ("split",)),
        ("merge", ("filter-train", "filter-val")),
    ]
    assert stages[2].words[2:4] == (f"{tmp_path}/p/s/val", f"out={tmp_path}/p/f-val")


def test_stages_of_the_same_values_follow_each_other() -> None:
    folder, stages = load_pipeline(REPO / "configs" / "pipeline" / "demo.yaml")
    assert folder == Path("runs/pipeline")
    assert {s.name: s.after for s in stages}["evaluate-1"] == ("finetune-1", "test-shards")
    assert len(stages) == 9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("after: [split]", "after: [spilt]", "'filter' is to come after 'spilt', which is no stage. Known are filter, split, merge"),
        ("name: split,", "name: split, after: [merge],", "filter-train, filter-val, split, merge wait for each other"),
        ("name: split", "name: merge", "the name 'merge' is given twice"),
        ("{folder}/s/{part}", "{folder}/s/{prat}", "the command of 'filter' has braces that nothing fills: 'prat'"),
        ("name: split", "name: a/b", "'a/b' is no name"),
    ],
)
def test_pipeline_that_cannot_be_run_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline(write(tmp_path, PIPELINE.replace(old, new)))


def test_array_of_fine_tunes_has_a_table_of_results(tmp_path: Path) -> None:
    command = "evaluate {folder}/finetune-{lr}-{seed} task=classification data=x out={folder}/reports/{lr}-{seed}"
    path = write(
        tmp_path, f"folder: FOLDER\nstages:\n  - {{name: evaluate, grid: {{lr: [1e-4, 1e-3], seed: [0, 1]}}, command: {command!r}}}\n"
    )
    folder, stages = load_pipeline(path)
    for number, stage in enumerate(stages[:3]):
        report = Path(stage.words[-1].removeprefix("out=")) / "report.json"
        report.parent.mkdir(parents=True)
        report.write_text(json.dumps({"metrics": {"accuracy": 0.5 + number / 10, "auroc": None}}))
        (folder / "done").mkdir(exist_ok=True)
        (folder / "done" / stage.name).write_text(command_of(stage))
    assert [line.split() for line in table(folder, stages).splitlines()] == [
        ["evaluate-1e_4-0", "done", "accuracy", "0.5", "auroc", "null"],
        ["evaluate-1e_4-1", "done", "accuracy", "0.6", "auroc", "null"],
        ["evaluate-1e_3-0", "done", "accuracy", "0.7", "auroc", "null"],
        ["evaluate-1e_3-1", "-"],
    ]


def test_pipeline_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write(tmp_path)
    done = run(path)
    assert (done.returncode, done.stdout.count("left out, as what it needs has failed")) == (1, 3)
    make_data_set(tmp_path / "base")
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split() for line in done.stdout.splitlines()[-4:]] == [
        [n, "done"] for n in ("split", "filter-train", "filter-val", "merge")
    ]
    folder, stages = load_pipeline(path)
    assert pending(folder, stages) == []
    (folder / "done" / "filter-val").unlink()  # as when it was killed
    assert [stage.name for stage in pending(folder, stages)] == ["filter-val", "merge"]
    path.write_text(path.read_text().replace("train=0.5 val=0.5", "train=0.25 val=0.75"))
    assert [stage.name for stage in pending(*load_pipeline(path))] == [stage.name for stage in stages]
    assert table(folder, stages).splitlines()[2] == "filter-val    -"


RUNS = """
folder: FOLDER
stages:
  - {name: pretrain, command: "launch a.yaml run={folder}/pretrain train.steps=4"}
  - {name: finetune, after: [pretrain], grid: {seed: [0, 1]}, command: "launch b.yaml run={folder}/finetune-{seed} train.steps=4"}
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of mmscale that makes a run's folder, or fails where FAIL names it; the runs that it has started."""
    program, started = tmp_path / "mmscale", tmp_path / "started"
    lines = [
        f"#!{sys.executable}",
        "import os, sys, pathlib",
        "run = next(word[4:] for word in sys.argv if word.startswith('run='))",
        f"open({str(started)!r}, 'a').write(os.path.basename(run) + chr(10))",
        "pathlib.Path(run).mkdir(parents=True, exist_ok=True)",
        "sys.exit(run.endswith(os.environ.get('FAIL', '-')))",
    ]
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    monkeypatch.setattr(pipeline_run, "find_program", lambda name: str(program))
    return started


def test_what_was_made_of_other_commands_is_not_gone_on_with(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(old: str = "", new: str = "") -> list[str]:
        path = tmp_path / "pipeline.yaml"
        path.write_text((path.read_text() if path.exists() else RUNS.replace("FOLDER", str(tmp_path / "p"))).replace(old, new))
        programs.write_text("")
        pipeline_run.run_here(*load_pipeline(path))
        return programs.read_text().split()

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / "p").glob("*before*"))

    everything = ["pretrain", "finetune-0", "finetune-1"]
    assert again() == everything
    assert again() == []
    assert again("{folder}/pretrain train.steps=4", "{folder}/pretrain train.steps=8") == everything
    assert kept() == ["finetune-0.before-1", "finetune-1.before-1"]  # the longer run goes on, those that started from it do not
    monkeypatch.setenv("FAIL", "finetune-0")
    assert again("pretrain train", "pretrain optimizer.lr=1e-5 train") == everything
    assert kept() == ["finetune-0.before-1", "finetune-0.before-2", "finetune-1.before-1", "finetune-1.before-2", "pretrain.before-1"]
    monkeypatch.delenv("FAIL")
    assert again() == ["finetune-0"]  # it goes on
    assert len(kept()) == 5
    assert "the run of other commands was moved to" in capsys.readouterr().out


def test_no_later_stage_counts_as_done_while_an_earlier_one_is_redone(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, RUNS)
    folder, stages = load_pipeline(path)
    pipeline_run.run_here(folder, stages)
    path.write_text(path.read_text().replace("pretrain train", "pretrain optimizer.lr=1e-5 train"))
    changed = load_pipeline(path)[1]
    begin = pipeline_run._begin

    def interrupted(*words: Any) -> None:
        if words[1].name == "finetune-0":
            raise KeyboardInterrupt
        begin(*words)

    monkeypatch.setattr(pipeline_run, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline_run.run_here(folder, changed)
    assert [stage.name for stage in pending(folder, changed)] == ["finetune-0", "finetune-1"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{name: a, command: ""}', "'a' has an empty command"),
        ('{name: a, command: "x \'y"}', "the command of 'a' is no line of a shell: No closing quotation"),
        ("{name: a, command: x, grid: {folder: [1]}}", "has the key 'folder', which is the pipeline's"),
        ("{name: a, command: x, grid: {k: []}}", "the grid of 'a' has no value for 'k'"),
        ("{name: a, command: x, grid: {k: [null]}}", "may have numbers and texts for 'k'; got \\[None\\]"),
        ("{name: a, command: x, grid: {k: [a/b, a b]}}", "two stages would be called 'a-a_b'"),
        ('{name: a, command: "x {folder.x}"}', "braces that nothing fills"),
    ],
)
def test_stages_that_cannot_be_are_refused(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline(write(tmp_path, f"folder: FOLDER\nstages:\n  - {entry}\n"))


@pytest.mark.parametrize(
    ("now", "goes_on"),
    [
        ("launch a.yaml run=r train.steps=8 optimizer.lr=1", True),
        ("launch a.yaml optimizer.lr=1 run=r train.steps=4 log.every=1 --ranks-per-node 4", True),
        ("launch --cluster c.yaml a.yaml run=r train.steps=4 optimizer.lr=1 checkpoint.every=2", True),
        ("launch a.yaml run=r train.steps=4 optimizer.lr=2", False),
        ("launch b.yaml run=r train.steps=4 optimizer.lr=1", False),
    ],
)
def test_what_changes_nothing_of_what_is_learned_goes_on(now: str, goes_on: bool) -> None:
    before = {"a": ["launch", "a.yaml", "run=r", "train.steps=4", "optimizer.lr=1", "--ranks-per-node", "2"], "b": ["evaluate"]}
    assert pipeline_run._goes_on(before, before | {"a": now.split()}, "a") is goes_on
    assert not pipeline_run._goes_on(before, before | {"a": now.split(), "b": ["evaluate", "x"]}, "a")


def test_a_run_that_two_stages_train_is_not_moved_between_them(tmp_path: Path, programs: Path) -> None:
    text = "folder: FOLDER\nstages:\n  - {name: one, command: 'launch a.yaml run={folder}/r train.steps=1'}\n"
    text += "  - {name: two, after: [one], command: 'launch a.yaml run={folder}/r train.steps=2'}\n"
    for rate in (1, 2):
        pipeline_run.run_here(*load_pipeline(write(tmp_path, text.replace("train", f"optimizer.lr={rate} train"))))
    assert [path.name for path in sorted((tmp_path / "p").glob("r*"))] == ["r", "r.before-1"]


def test_the_run_of_a_stage_is_found_in_its_stage_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("nodes: 1\n")
    (tmp_path / "a.yaml").write_text("run: here\n")
    for words in (("--cluster", f"{tmp_path}/c.yaml", f"{tmp_path}/a.yaml"), (f"{tmp_path}/a.yaml", "--cluster", f"{tmp_path}/c.yaml")):
        assert pipeline_run._run_of(Stage(name="s", words=("launch", *words), after=())) == Path("here")


def test_a_job_that_was_begun_with_what_has_changed_since_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, RUNS)
    folder, stages = load_pipeline(path)
    pipeline_run._left(folder, stages)
    (folder / "jobs").mkdir()
    for number, stage in enumerate(stages):
        pipeline_run._begin(folder, stage, stages)
        (folder / "jobs" / f"{stage.name}.json").write_text(json.dumps({"job": str(number), "command": command_of(stage)}))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho PENDING\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert pipeline_run.run_on_slurm(folder, stages, "slurm", []) == 0
    path.write_text(path.read_text().replace("pretrain train", "pretrain optimizer.lr=1e-5 train"))
    with pytest.raises(RunError, match=r"The stage 'finetune-0' is job 1, which was begun with what has changed since\. .*scancel 1"):
        pipeline_run.run_on_slurm(*load_pipeline(path), "slurm", [])
