"""The demo is the commands that a user would type: which ones, and in which order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.demo import glyph_stages, hold_out, own_stages, source_words, summarize
from shards.errors import ConfigError
from tests.launcher.launching import Launched, wait_for, write_stage

REPO = Path(__file__).resolve().parents[2]


def test_glyph_stages_word_for_word() -> None:
    assert [" ".join(stage.words) for stage in glyph_stages(Path("runs/demo"))] == [
        "shards write configs/demo/shards.yaml glyphs.split=train out=runs/demo/shards/train",
        "shards write configs/demo/shards.yaml glyphs.split=heldout out=runs/demo/shards/heldout",
        "launch configs/demo/pretrain.yaml run=runs/demo/pretrain data.shards=runs/demo/shards/train --ranks-per-node 2",
        "launch configs/demo/finetune.yaml run=runs/demo/finetune data.shards=runs/demo/shards/train init_from=runs/demo/pretrain "
        "--ranks-per-node 2",
        "evaluate runs/demo/pretrain configs/demo/evaluate.yaml task=retrieval data=runs/demo/shards/heldout "
        "out=runs/demo/evaluations/retrieval",
        "evaluate runs/demo/pretrain configs/demo/evaluate.yaml task=captioning data=runs/demo/shards/heldout "
        "out=runs/demo/evaluations/captioning",
        "evaluate runs/demo/finetune configs/demo/evaluate.yaml task=classification data=runs/demo/shards/heldout "
        "out=runs/demo/evaluations/classification samples=0",
    ]


@pytest.mark.parametrize(("label", "stages"), [(None, 5), ("kind", 7)])
def test_own_pairs_get_a_classifier_only_with_a_label(label: str | None, stages: int) -> None:
    words = [" ".join(stage.words) for stage in own_stages(Path("runs/demo-mine"), label, 1769)]
    assert len(words) == stages
    assert any("data.label=kind data.text=null" in line for line in words) == (label is not None)
    assert "train.steps=414" in words[2]


@pytest.mark.parametrize(("pairs", "steps"), [(60, 200), (1769, 414), (10_000_000, 1600)])
def test_few_pairs_are_not_learned_by_heart(pairs: int, steps: int) -> None:
    assert f"train.steps={steps}" in own_stages(Path("runs/demo-mine"), None, pairs)[2].words


def test_kind_of_the_users_data_is_told_from_the_path(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").touch()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    assert source_words(tmp_path / "pairs.csv")[0] == "source=table"
    assert source_words(tmp_path / "tars")[0] == "source=webdataset"
    assert source_words(tmp_path)[0] == "source=folder"


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no '.*nowhere'\. Give DATA the path of a folder"):
        source_words(tmp_path / "nowhere")
    (tmp_path / "pairs.xlsx").touch()
    with pytest.raises(ConfigError, match=r"pairs\.xlsx' is not a table that can be read: its name must end in \.csv"):
        source_words(tmp_path / "pairs.xlsx")


@pytest.mark.parametrize("words", [["--label", "kind"], ["columns.image=file"]])
def test_what_needs_data_is_refused_without(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.demo", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert done.stderr == "demo: LABEL and WORDS say how pairs of your own are read. Give DATA, the path of the pairs, too.\n"


def write_shards(folder: Path, count: int) -> None:
    (folder / "all").mkdir()
    for number in range(count):
        (folder / "all" / f"{number:06}.tar").write_text(str(number))
        (folder / "all" / f"{number:06}.index.arrow").write_text(str(number))


def test_every_tenth_shard_is_held_out_and_twice_is_once(tmp_path: Path) -> None:
    write_shards(tmp_path, 25)
    hold_out(tmp_path)
    hold_out(tmp_path)
    assert sorted(p.name for p in (tmp_path / "heldout").glob("*.tar")) == ["000009.tar", "000019.tar"]
    assert len(list((tmp_path / "train").glob("*.tar"))) == len(list((tmp_path / "train").glob("*.index.arrow"))) == 23


def test_too_few_pairs_to_hold_some_out(tmp_path: Path) -> None:
    write_shards(tmp_path, 1)
    with pytest.raises(ConfigError, match="too few pairs to hold some out: at least 51 are needed"):
        hold_out(tmp_path)


def test_summary_keeps_the_numbers_that_tell() -> None:
    metrics = {
        "retrieval": {"candidates": 1000.0, "image_to_text_r1": 0.5, "text_to_image_r1": 0.6, "image_to_text_r5": 0.9},
        "classification": {"accuracy": 0.97, "seconds": 3.0},
    }
    assert summarize(metrics, minutes=8.126) == {
        "retrieval": {"candidates": 1000.0, "image_to_text_r1": 0.5, "text_to_image_r1": 0.6},
        "classification": {"accuracy": 0.97},
        "minutes": 8.13,
    }


def test_ctrl_c_ends_the_stage_and_all_it_has_started(tmp_path: Path) -> None:
    words = ("launch", str(write_stage(tmp_path)), "--ranks-per-node", "2", "--module", "tests.launcher.standin")
    program = f"from launcher.demo import Stage, run_stage; run_stage(Stage(title='t', words={words!r}), '1 of 1')"
    demo = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPO,
        env=os.environ | {"MMSCALE_STANDIN": "run"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    launched = Launched(demo, tmp_path / "run")  # type: ignore[arg-type]
    try:
        wait_for(lambda: len(launched.ranks()) == 2, 180)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) != 0
        assert launched.processes() == []
    finally:
        for process in launched.processes():
            process.kill()
