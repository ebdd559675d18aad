"""`mmscale evaluate` on a checkpoint that training wrote: the numbers, the files, and what is said of a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
        (["task=retrieval", "data={tmp}/nothing"], 1, "There is no data set folder '{tmp}/nothing'."),
    ],
)
def test_a_mistake_is_one_paragraph(tiny_run: Path, glyphs: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = evaluate(tiny_run, *(word.format(glyphs=glyphs, tmp=tmp_path) for word in words))
    said = [line for line in done.stderr.splitlines() if line.startswith("mmscale: ")]
    assert (done.returncode, done.stdout, len(said)) == (code, "", 1), done.stderr
    assert said[0].startswith(f"mmscale: {message.format(tmp=tmp_path)}")
    assert "Traceback" not in done.stderr
