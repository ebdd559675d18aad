"""`mmscale evaluate` on a checkpoint that training wrote: the numbers, the files, and what is said of a mistake."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.checkpoint.find import name_of, resolve
from mmscale.errors import CheckpointError
from tests.training.runs import environment

MMSCALE = Path(sys.executable).with_name("mmscale")


def evaluate(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MMSCALE, "evaluate", *map(str, words)], env=environment(), capture_output=True, text=True, check=False)


def test_words_go_over_the_file_and_the_report_says_what_was_printed(tiny_run: Path, glyphs: Path, tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text(f"task: captioning\ndata: {glyphs}\nsamples: 50\nbatch: 20\n")
    done = evaluate(tiny_run, file, "task=retrieval", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    printed = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["checkpoint"] == str(tiny_run / "checkpoints" / "step-00000012")
    assert (report["task"], report["data"]) == ("retrieval", str(glyphs))
    assert printed == pytest.approx(report["metrics"], rel=1e-4)
    assert printed["candidates"] == 50
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in records}) == 50
    assert (tmp_path / "out" / "retrieval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["task=vqa", "data={glyphs}"], 2, "`task=vqa` needs a model with a label head; this one was trained without."),
        (["task=retrieval", "data={glyphs}", "sample=5"], 2, "`sample`: Key 'sample' not in 'EvaluateCommand'. Did you mean: 'samples'"),
        (["task=retrieval"], 2, "`data` is required and not set."),
        (["task=retrieval", "data={glyphs}", "batch=0"], 2, "`batch` must be at least 1; got 0."),
        (["task=retrieval", "data={glyphs}", "samples=-1"], 2, "`samples` must be at least 1, or 0 for all; got -1."),
        (
            ["task=retrieval", "data={glyphs}", "out={glyphs}/manifest.parquet/x"],
            1,
            "'{glyphs}/manifest.parquet/x/unfinished.jsonl' cannot be used: Not a",
        ),
        (["task=retrieval", "data={tmp}/nothing"], 1, "There is no data set folder '{tmp}/nothing'."),
    ],
)
def test_a_mistake_is_one_paragraph(tiny_run: Path, glyphs: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = evaluate(tiny_run, *(word.format(glyphs=glyphs, tmp=tmp_path) for word in words))
    said = [line for line in done.stderr.splitlines() if line.startswith("mmscale: ")]
    assert (done.returncode, done.stdout, len(said)) == (code, "", 1), done.stderr
    assert said[0].startswith(f"mmscale: {message.format(tmp=tmp_path, glyphs=glyphs)}")
    assert "Traceback" not in done.stderr


def test_a_checkpoint_by_itself_is_evaluated_beside_itself(tiny_run: Path, glyphs: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "checkpoints" / "step-00000012", tmp_path / "average")
    command = [MMSCALE, "evaluate", ".", "task=retrieval", f"data={glyphs}", "samples=20"]
    done = subprocess.run(command, cwd=tmp_path / "average", env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "average-evaluations" / "retrieval" / "report.json").is_file()
    assert not (tmp_path / "average" / "evaluations").exists()


def test_a_damaged_checkpoint_is_passed_over_aloud(tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    for step in (6, 12):
        shutil.copytree(tiny_run / "checkpoints" / "step-00000012", run / "checkpoints" / name_of(step))
    (run / "checkpoints" / name_of(12) / "model" / "config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, "mmscale"):
        assert resolve(run).name == name_of(6)
    assert f"{name_of(12)} is damaged: " in caplog.text
    (run / "checkpoints" / name_of(6) / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^No checkpoint of the run .* is good\. The newest, {name_of(12)}, is damaged: "):
        resolve(run)
