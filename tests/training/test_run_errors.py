"""What a user does wrong with a run, by the text of the answer: one paragraph, exit code 2 for the configuration, else 1."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.ports import free_port
from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards
from tests.training.alone import Alone
from tests.training.runs import environment


def complain(alone: Alone, code: int, *words: object) -> str:
    """Run, and return the one paragraph that is said."""
    got, out, err = alone(*words)
    assert got == code, (out, err)
    said = [line for line in err.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert len(said) == 1, err
    assert "Traceback" not in err
    return said[0].removeprefix("mmscale: error: ")


def test_data_that_is_not_there_or_not_finished(alone: Alone, stage: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    said = complain(alone, 1, stage, f"run={tmp_path}/r", f"data.shards={nothing}")
    assert said == f"There is no data set folder {str(nothing)!r}. Write one with `mmscale shards write out={nothing}`."
    nothing.mkdir()
    said = complain(alone, 1, stage, f"run={tmp_path}/r", f"data.shards={nothing}")
    assert said.startswith(f"The folder {str(nothing)!r} has no manifest.parquet: it was not written to its end, or it holds tars")


def test_a_stage_file_must_come_first(alone: Alone) -> None:
    assert complain(alone, 2, "train.steps=3") == "Give a stage file first: mmscale.train CONFIG [key=value ...]."
    assert complain(alone, 2, "none.yaml").startswith("There is no configuration file 'none.yaml'. Give the path of a YAML file.")


def test_a_run_folder_that_cannot_be_made(alone: Alone, stage: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = complain(alone, 2, stage, f"run={tmp_path}/file/run")
    assert said == (
        f"The run folder '{tmp_path}/file/run' cannot be made: Not a directory. Give another `run`, in a folder that can be written to."
    )


def test_a_file_that_lacks_on_one_host_is_said_in_its_ranks_log(tmp_path: Path) -> None:
    """Where ranks share a terminal the first one speaks for all."""
    command = [sys.executable, "-m", "mmscale.train", "none.yaml"]
    for variables, told in (({}, False), ({"MMSCALE_LAUNCH_ID": "a"}, True)):
        env = environment() | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"} | variables
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, "There is no configuration file 'none.yaml'" in done.stderr) == (2, told), done.stderr


@pytest.mark.slow
def test_what_the_first_rank_alone_reads_ends_all_ranks_alike(stage: Path, tmp_path: Path) -> None:
    shared = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [str(stage), f"run={tmp_path}/run", "task.name=classification", "data.label=nothing"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "mmscale.train", *words],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert ["mmscale: error: `data.label=nothing` is a field of no sample" in text for text in said] == [True, False]


def test_unknown_key_and_wrong_type(alone: Alone, stage: Path, tmp_path: Path) -> None:
    said = complain(alone, 2, stage, f"run={tmp_path}/r", "train.stesp=4")
    assert said.startswith("`train.stesp`: Key 'stesp' not in 'TrainConfig'. Did you mean: 'steps'")
    said = complain(alone, 2, stage, f"run={tmp_path}/r", "train.steps=many")
    assert said == "`train.steps`: Value 'many' of type 'str' could not be converted to Integer (in the command line)."


def test_batch_that_does_not_divide(alone: Alone, stage: Path, tmp_path: Path) -> None:
    said = complain(alone, 2, stage, f"run={tmp_path}/r", "train.micro_batch=5")
    assert said == "`train.global_batch` must divide by micro_batch x ranks = 5 x 1 = 5; got 16. Use 15 or 20."


def test_start_from_what_is_no_checkpoint(alone: Alone, stage: Path, tmp_path: Path, glyphs: Path) -> None:
    said = complain(alone, 1, stage, f"run={tmp_path}/r", f"init_from={tmp_path}/nothing")
    assert said == (
        f"`init_from`: {f'{tmp_path}/nothing'!r} does not exist. Give a checkpoint or a run folder; init_from=null starts from random "
        "weights."
    )
    said = complain(alone, 1, stage, f"run={tmp_path}/r", f"init_from={glyphs}")
    assert said.startswith(f"{str(glyphs)!r} is not a checkpoint: it has no MANIFEST.json.")


def test_start_from_another_model(alone: Alone, stage: Path, tmp_path: Path, tiny_run: Path) -> None:
    said = complain(alone, 1, stage, f"run={tmp_path}/r", f"init_from={tiny_run}", "model.hidden_size=64")
    checkpoint = tiny_run / "checkpoints" / "step-00000012"
    assert said.startswith(f"`init_from`: {str(checkpoint)!r} is of another model: ")
    assert re.search(r"is \(.*\) there and \(.*\) here \(\d+ tensors differ\)\. Use the same `model` part and tokenizer as that run", said)
    said = complain(alone, 1, stage, f"run={tmp_path}/r", f"init_from={tiny_run}", "model.image_mean=[0.9,0.9,0.9]")
    assert said == (
        f"`init_from`: {str(checkpoint)!r} was trained with model.image_mean = [0.5, 0.5, 0.5], here it is [0.9, 0.9, 0.9]. "
        "Use the same `model` part as that run."
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.num_heads=4"], r"it is of another model \(num_heads was 2, now 4\)\. Restore the model's configuration, or use a new"),
        (["train.seed=2"], r"its order was \w{12}, now it is \w{12}\. Restore `train\.seed`, `data\.order` and the weights of the steps"),
        (["train.global_batch=8"], r"its global_batch was 16, now it is 8\. Restore `train\.global_batch`, or use a new `run` folder\."),
        (
            ["train.precision=bf16"],
            r"its precision was float32, now it is bfloat16\. Restore `train\.precision`, or use a new `run` folder",
        ),
        (["train.ema_decay=0.9"], r"it holds no moving average and the run is to have one\. Restore `train\.ema_decay`\."),
        (
            ["task.name=retrieval"],
            r"it was trained for no task, now it is to be for task\.name=retrieval, data\.label=None\. Restore `task`",
        ),
        (["optimizer.freeze=[norm]"], r" was trained and is frozen now\. Restore `optimizer\.freeze`\."),
    ],
)
def test_continue_a_run_as_another_one(alone: Alone, stage: Path, tmp_path: Path, tiny_run: Path, words: list[str], message: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    told = [(run / name).read_text() for name in ("status.json", "config.yaml")]
    said = complain(alone, 1, stage, f"run={run}", "train.steps=14", *words)
    assert said.startswith(f"The run's checkpoint {str(run / 'checkpoints' / 'step-00000012')!r} cannot be continued: ")
    assert re.search(message, said), said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before  # nothing of the old run is lost
    assert [(run / name).read_text() for name in ("status.json", "config.yaml")] == told  # nor what is said of it


def test_continue_a_run_on_another_data_set(alone: Alone, stage: Path, tmp_path: Path, tiny_run: Path, glyphs: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(tiny_run, run)
    words = ["source=glyphs", f"out={other}", "glyphs.every=200", "glyphs.size=16", "rows_per_shard=64", "processes=1"]
    write_shards(configfile.load(WriteConfig, None, [*words, "tokenizer.kind=none"]), progress=False)
    said = complain(alone, 1, stage, f"run={run}", "train.steps=14", f"data.shards={other}", f"data.tokenizer={glyphs}/tokenizer")
    assert re.search(
        r"cannot be continued: it is of another data set \(digest \w{12}, now \w{12}\)\. Restore `data\.shards`, or use a new `run` folder "
        r"with init_from set to this checkpoint\.$",
        said,
    )


def test_the_newest_checkpoint_is_damaged(alone: Alone, stage: Path, tmp_path: Path, tiny_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    weights = next((run / "checkpoints" / "step-00000012" / "state").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    code, out, err = alone(stage, f"run={run}", "checkpoint.every=4")
    assert code == 0, out + err
    assert f"step-00000012 is damaged: state/{weights.name} does not match its sha256. It was moved to .bad-step-00000012" in out
    assert "step-00000008: step 8, 128 samples seen" in out
    assert (run / "checkpoints" / "step-00000012" / "MANIFEST.json").is_file()
    assert (run / "metrics.jsonl").read_text().count('"step": 12,') == 1
