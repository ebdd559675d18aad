"""The `mmscale` command: what it offers, and that a mistake is one paragraph and an exit code, never a traceback."""

import subprocess
from pathlib import Path

import pytest

from launcher.cli import split_words
from tests.launcher.launching import MMSCALE, REPO, write_stage


def mmscale(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MMSCALE, *map(str, words)], cwd=REPO, capture_output=True, text=True, check=False)


def test_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path) -> None:
    done = mmscale("launch", write_stage(tmp_path), "train.seed=3", "--ranks-per-node", "2", "--master-port", "29999", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "ranks    2 (localhost x 2)" in done.stdout
    assert "deepspeed --num_accelerators 2 --master_port 29999 " in done.stdout
    assert done.stdout.rstrip().endswith("train.seed=3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("launch", "nowhere.yaml"), 2, "There is no configuration file 'nowhere.yaml'"),
        (("launch", "{stage}", "train.step=3"), 2, "train.step"),
        (("launch", "{stage}", "train.steps=many"), 2, "train.steps"),
        (("launch", "{stage}", "--ranks-per-node", "3"), 2, "`train.global_batch` must divide by the ranks, 3; got 8. Use 6 or 9."),
        (("launch", "{stage}", "--hostfile", "nowhere"), 2, "The hostfile 'nowhere' cannot be read"),
        (("runs", "show", "{folder}"), 1, "is not a run folder"),
        (("checkpoints", "verify", "{folder}"), 1, "has no committed checkpoint"),
        (("shards", "write", "source=folder"), 2, "`out` is required"),
        (("shards", "write", "source=glyphs", "out={folder}/x", "--part", "0/3"), 2, "`part` must be i/n with i from 1 to n"),
    ],
)
def test_mistake_is_one_paragraph(tmp_path: Path, words: tuple[str, ...], code: int, message: str) -> None:
    stage = write_stage(tmp_path)
    done = mmscale(*(word.format(stage=stage, folder=tmp_path) for word in words))
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.startswith("mmscale: ")
    assert done.stderr.count("\n") == 1


def test_leading_configuration_file_is_told_from_words() -> None:
    assert split_words(["a.yaml", "b=1"]) == (Path("a.yaml"), ["b=1"])
    assert split_words(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert split_words([]) == (None, [])
