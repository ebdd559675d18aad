"""Tasks from their configuration to a report: trained by the per-rank entry point, evaluated from the checkpoint."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.cli import main as command
from mmscale.checkpoint.find import resolve
from mmscale.checkpoint.model_folder import tokenizer_of
from mmscale.data.tokenize import TextTokenizer
from mmscale.evaluate import EvaluateCommand, evaluate_command, evaluation_config
from mmscale.tasks import kind_of
from mmscale.tasks.answering import Answering
from shards import configfile
from shards.errors import ConfigError, ShardError
from tests.data.tiny import tokenizer_folder, write
from tests.tasks.predicting import stage as stage_config
from tests.training.alone import Alone
from tests.training.runs import environment, records, train

STAGE = """
data: {caption: null, text: null, max_text_tokens: 16}
model: {hidden_size: 32, num_heads: 2, unimodal_layers: 1, fusion_layers: 1, image_size: 16, patch_size: 8, max_text_tokens: 16,
        projection_size: 16}
train: {steps: 40, global_batch: 32, seed: 1, precision: fp32, timeout_s: 120}
optimizer: {warmup_steps: 4, lr: 3e-3}
log: {every: 10, tensorboard: false}
"""


def sample(index: int) -> dict[str, bytes]:
    """A grey of brightness b above one of 255 - b; its rating, tags and answer follow from b."""
    bright = 16 * (index * 7 % 16) + 4
    pixels = np.full((16, 16, 3), bright, np.uint8)
    pixels[8:] = 255 - bright
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    tags = [name for name, holds in (("dim", bright < 100), ("dark", bright < 50), ("light", bright > 180)) if holds]
    fields = {"rating": 10 + bright / 20, "tags": tags, "answer": "upper" if bright > 127 else "lower", "question": "a circle"}
    fields |= {"word": "above" if bright > 127 else "left", "words": ["above" if bright > 127 else "left"] * 6 + ["circle"] * 4}
    return {"png": stream.getvalue(), "json": json.dumps(fields).encode()}


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("greys") / "shards", sample, (40, 24))
    tokenizer_folder(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, greys: Path) -> Path:
    path = tmp_path_factory.mktemp("stage") / "stage.yaml"
    path.write_text(STAGE.replace("data: {", f"data: {{shards: {greys}, "))
    return path


def fine_tune(alone: Alone, stage: Path, run: Path, *words: str) -> None:
    code, out, err = alone(stage, f"run={run}", *words)
    assert code == 0, out + err


def evaluate(run: Path, task: str, data: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Metrics, report and records; the report must say what was returned, in JSON as everybody reads it."""
    out = run / "evaluated"
    metrics = dict(evaluate_command(run, None, [f"task={task}", f"data={data}", f"out={out}", "device=cpu", *words]))
    report = json.loads((out / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["metrics"] == metrics
    return metrics, report, records(out / "predictions.jsonl")


def assert_pictures(run: Path, *names: str) -> None:
    """The evaluation drew these and no others."""
    assert sorted(path.name for path in (run / "evaluated").glob("*.png")) == sorted(names)
    for name in names:
        with Image.open(run / "evaluated" / name) as picture:
            assert min(picture.size) > 300
            assert np.ptp(np.asarray(picture.convert("L"))) > 100


def test_tags_are_learned(tmp_path: Path, greys: Path, stage: Path, alone: Alone) -> None:
    run = tmp_path / "run"
    fine_tune(alone, stage, run, "task.name=tagging", "data.label=tags", "zero.stage=3")
    metrics, _, found = evaluate(run, "tagging", greys)
    assert metrics["map"] > 0.9
    assert metrics["map_low"] <= metrics["map"] <= metrics["map_high"]
    assert metrics["samples"] == 64
    assert all(set(r["predictions"]) <= {"dark", "dim", "light"} for r in found)
    assert_pictures(run, "examples.png", "attention.png")
    logged = records(run / "metrics.jsonl")
    assert logged[-1]["loss/tag"] < logged[0]["loss/tag"]


@pytest.mark.parametrize("loss", ["smooth_l1", pytest.param("squared", marks=pytest.mark.slow)])
def test_ratings_are_learned_in_their_own_unit(tmp_path: Path, greys: Path, stage: Path, alone: Alone, loss: str) -> None:
    run = tmp_path / "run"
    fine_tune(alone, stage, run, "task.name=regression", "data.label=rating", f"task.loss={loss}")
    metrics, _, found = evaluate(run, "regression", greys, "batch=7")
    assert metrics["rmse"] < 0.5 * metrics["rmse_of_mean"]
    assert metrics["pearson"] > 0.9
    assert metrics["spearman"] > 0.9
    assert {r["target"] for r in found} == {10 + (16 * i + 4) / 20 for i in range(16)}
    assert_pictures(run, "scatter.png")
    with pytest.raises(
        ConfigError, match=r"^`task=tagging` needs a model with a tags head; this one was trained without\. It was trained for"
    ):
        evaluate(run, "tagging", greys)


def striped(index: int, odd: bool) -> dict[str, bytes]:
    """Upright stripes of two greys; an odd one has a square of other stripes, lying across."""
    draw = np.random.default_rng(index)
    dark, bright = draw.integers(0, 100), draw.integers(150, 256)
    upright = np.where((np.arange(16) + draw.integers(4)) // 2 % 2, dark, bright)[None].repeat(16, 0)
    if odd:
        upright[4:12, 4:12] = upright.T[4:12, 4:12]
    stream = io.BytesIO()
    Image.fromarray(upright[..., None].repeat(3, 2).astype(np.uint8)).save(stream, "PNG")
    return {"png": stream.getvalue(), "json": json.dumps({"odd": odd}).encode()}


def test_what_is_odd_is_found_by_who_has_seen_the_normal_alone(tmp_path: Path, greys: Path, stage: Path, alone: Alone) -> None:
    """Its shards have no tokenizer, and what starts from it may read words all the same."""
    run, normal = tmp_path / "run", write(tmp_path / "normal", lambda index: striped(index, False), (128,))
    both = write(tmp_path / "both", lambda index: striped(1000 + index, index % 3 == 0), (60,))
    words = ("task.name=anomaly", "data.label=odd", "objectives.masked_image.mask=0.5", "model.patch_size=4", "train.steps=250")
    fine_tune(alone, stage, run, f"data.shards={normal}", *words)
    metrics, _, found = evaluate(run, "anomaly", both)
    assert metrics["auroc"] > 0.95
    assert metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"]
    assert (metrics["anomalies"], metrics["samples"]) == (20, 60)
    assert_pictures(run, "anomalies.png")
    again, _, rest = evaluate(run, "anomaly", both, "batch=7")
    assert again["auroc"] == pytest.approx(metrics["auroc"], abs=0.01)
    assert [r["score"] for r in rest] == pytest.approx([r["score"] for r in found], rel=1e-4)
    words = ("task.name=vqa", "data.label=answer", "data.text=question", "model.patch_size=4", "train.steps=1")
    fine_tune(alone, stage, tmp_path / "words", f"init_from={run}", *words)
    saved = TextTokenizer(tokenizer_of(resolve(tmp_path / "words")))
    assert saved.digest == TextTokenizer(greys / "tokenizer").digest


def test_answers_have_a_report_with_pictures(
    tmp_path: Path, greys: Path, stage: Path, alone: Alone, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = ("task.name=vqa", "data.label=answer", "data.text=question", "train.steps=10", "log.tensorboard=true")
    fine_tune(alone, stage, run, *words)
    metrics, _, found = evaluate(run, "vqa", greys)
    assert {"accuracy", "accuracy_low", "accuracy_high", "macro_f1", "auroc", "ece"} < set(metrics)
    assert len(found) == 64
    assert_pictures(run, "confusion.png", "examples.png", "attention.png")
    board = EventAccumulator(str(run / "evaluated"))
    board.Reload()
    assert set(board.Tags()["images"]) == {"vqa/attention", "vqa/confusion", "vqa/examples"}
    (event,) = board.Scalars("vqa/accuracy")
    assert (event.step, event.value) == (10, pytest.approx(metrics["accuracy"]))
    own = run / "evaluated" / "events.out.tfevents.1.mine"
    own.touch()
    evaluate(run, "vqa", greys)
    assert len(list((run / "evaluated").glob("events.*"))) == 2
    assert own.exists()
    one = write(tmp_path / "one", lambda i: sample(0), (5,))
    told = ["task=vqa", f"data={one}", f"out={tmp_path / 'one-out'}", "device=cpu"]
    monkeypatch.setattr("sys.argv", ["mmscale", "evaluate", str(run), *told])
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code in (0, None)
    assert "auroc              null\n" in capsys.readouterr().out


def test_answers_are_learned_and_written(tmp_path: Path, greys: Path, stage: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation is interrupted after three batches; what goes on gives the very numbers of one that was not."""
    run, words = tmp_path / "run", ("data.caption=word", "data.prompt=question", "data.label=words", "task.answers=listed")
    fine_tune(alone, stage, run, "task.name=answering", *words, "zero.stage=3")
    whole, _, found = evaluate(run, "answering", greys, "batch=10")
    assert whole["vqa_accuracy"] > 0.9
    assert {r["prediction"] for r in found} == {"above", "left"}
    assert_pictures(run, "examples.png", "attention.png")
    seen: list[int] = []
    predict = Answering.predict

    def interrupted(self: Answering, model: Any, batch: Any, tokenizer: Any) -> list[dict[str, Any]]:
        seen.append(len(seen))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return predict(self, model, batch, tokenizer)

    monkeypatch.setattr(Answering, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, "answering", greys, "batch=10")
    rest, _, again = evaluate(run, "answering", greys, "batch=10")
    assert len(seen) == 4 + 4  # of seven batches three were kept
    assert ({**rest, "seconds": 0}, again) == ({**whole, "seconds": 0}, found)
    assert not (run / "evaluated" / "unfinished.jsonl").exists()


def test_an_empty_split_is_one_paragraph(tmp_path: Path, greys: Path, stage: Path, alone: Alone) -> None:
    run = tmp_path / "run"
    fine_tune(alone, stage, run, "task.name=vqa", "data.label=answer", "train.steps=1")
    empty = write(tmp_path / "empty", sample, (0,))
    with pytest.raises(ShardError, match=rf"^The data set '{empty}' holds no rows: there is nothing to read\. Look at it with"):
        evaluate(run, "vqa", empty)


def test_a_listed_answer_that_is_too_long_is_said_before_the_first_step(tmp_path: Path, stage: Path, alone: Alone) -> None:
    run, words = tmp_path / "run", ("data.caption=word", "data.prompt=question", "data.label=words", "task.answers=listed")
    long = "above " * 20
    code, _, err = alone(stage, f"run={run}", "task.name=answering", *words, f"data.labels=[left, {long}]")
    assert code == 2
    assert "`task.answers=listed`: the answer 'above above" in err
    assert "it must have less than half of model.max_text_tokens" in err
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_ranks_change_nothing(tmp_path: Path, stage: Path, greys: Path, alone: Alone) -> None:
    """With a rate of 0 every topology has the same weights: the evaluations of one and two ranks are equal to the last bit."""
    words = ("task.name=vqa", "data.label=answer", "train.steps=2", "optimizer.lr=0", "optimizer.min_lr_ratio=0", "evaluate.every=1")
    words += (f"evaluate.shards={greys}", "evaluate.batch=9", "evaluate.samples=50")
    fine_tune(alone, stage, tmp_path / "one", *words)
    done = train(2, stage, f"run={tmp_path / 'two'}", *words, timeout_s=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    one, two = (records(tmp_path / name / "evaluations.jsonl") for name in ("one", "two"))
    assert one == two
    assert [line["samples"] for line in one] == [50, 50]
    assert {"accuracy_low", "auroc", "ece"} < set(one[0])


@pytest.mark.slow
def test_ranks_change_nothing_of_re_ranking_and_of_drawn_answers(tmp_path: Path, stage: Path, greys: Path, alone: Alone) -> None:
    """Under ZeRO 3, where ranks wait for each other at every layer; the last round has samples for one rank alone."""
    still = ("train.steps=1", "optimizer.lr=0", "optimizer.min_lr_ratio=0", "evaluate.every=1", "zero.stage=3", "evaluate.samples=45")
    still += (f"evaluate.shards={greys}", "evaluate.batch=9")
    tasks = {
        "retrieval": ("data.caption=word", "data.text=word", "objectives.matching.weight=1", "task.rerank=3"),
        "answering": ("data.caption=word", "data.prompt=question", "data.label=words", "task.temperature=1.5"),
    }
    for task, words in tasks.items():
        fine_tune(alone, stage, tmp_path / f"{task}-1", f"task.name={task}", *words, *still)
        done = train(2, stage, f"run={tmp_path / f'{task}-2'}", f"task.name={task}", *words, *still, timeout_s=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        one, two = (records(tmp_path / f"{task}-{ranks}" / "evaluations.jsonl") for ranks in (1, 2))
        assert one == two
    assert "contrastive_image_to_text_r1" in records(tmp_path / "retrieval-2" / "evaluations.jsonl")[0]


def test_a_task_of_ones_own_is_a_module_and_a_configuration(tmp_path: Path, greys: Path, stage: Path, alone: Alone) -> None:
    run, name = tmp_path / "run", "tests.training.toy_task"
    fine_tune(alone, stage, run, f"task.name={name}", "task.options={squared: true}", "loader.workers=1")
    metrics, report, found = evaluate(run, name, greys)
    assert report["task"] == name
    assert len(found) == 64
    assert metrics["share_right"] > 0.9
    assert metrics["share_right_low"] <= metrics["share_right"]
    logged = records(run / "metrics.jsonl")
    assert logged[-1]["loss/brighter"] < 0.5 * logged[0]["loss/brighter"]


def test_a_task_of_ones_own_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_tasks_of_a_test"
    package.mkdir()
    (package / "good.py").write_text("from tests.training.toy_task import KIND\n")
    (package / "bad.py").write_text("KIND = 3\n")
    monkeypatch.syspath_prepend("/")  # restores sys.path afterwards
    monkeypatch.chdir(tmp_path)
    assert kind_of("my_tasks_of_a_test.good").head == "brighter"
    with pytest.raises(ConfigError, match=r"^`task.name=my_tasks_of_a_test.bad`: .*bad.py has no KIND of type mmscale.tasks.TaskKind\."):
        kind_of("my_tasks_of_a_test.bad")
    with pytest.raises(
        ConfigError, match=r"^`task.name=my_tasks_of_a_test.gone` names a module that is not there: no my_tasks_of_a_test.gone"
    ):
        kind_of("my_tasks_of_a_test.gone")


def test_a_name_that_is_no_task() -> None:
    said = (
        r"names no task\. There are classification, vqa, tagging, regression, retrieval, captioning, answering, reasoning, anomaly; a task"
    )
    with pytest.raises(ConfigError, match=rf"^`task=counting` {said}"):
        evaluation_config(stage_config(Path("x")), configfile.build(EvaluateCommand, [("test", {"task": "counting", "data": "x"})]))


def test_a_run_ends_early_and_stays_ended(tmp_path: Path, greys: Path, stage: Path, alone: Alone) -> None:
    """With a rate of 0 no evaluation is better than the first one: after two more the run is finished, with a checkpoint."""
    run = tmp_path / "run"
    words = ("task.name=vqa", "data.label=answer", "train.steps=40", "optimizer.lr=0", "optimizer.min_lr_ratio=0", "evaluate.every=3")
    words += (f"evaluate.shards={greys}", "evaluate.patience=2", "checkpoint.best=accuracy", "checkpoint.every=3")
    code, out, err = alone(stage, f"run={run}", *words)
    assert code == 0, out + err
    assert "ends early at step 9: accuracy was highest at step 3" in out
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 9)
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == [f"step-{n:08d}" for n in (3, 6, 9)]
    evaluations = records(run / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [3, 6, 9]
    code, out, err = alone(stage, f"run={run}", *words)
    assert (code, records(run / "evaluations.jsonl")) == (0, evaluations), out + err
    assert "the run is finished" in out
    code, out, err = alone(stage, f"run={run}", *words, "evaluate.patience=3")
    assert "ends early at step 12" in out, out + err


def test_a_stop_is_no_evaluation(tmp_path: Path, greys: Path, stage: Path, alone: Alone) -> None:
    """It would spend the time that the checkpoint has left, and end a run whose patience counts evaluations sooner than one that ran on."""
    run = tmp_path / "run"
    words = ("task.name=vqa", "data.label=answer", "train.steps=7", "optimizer.lr=0", "optimizer.min_lr_ratio=0", "evaluate.every=3")
    words += (f"evaluate.shards={greys}", "evaluate.patience=2", "checkpoint.best=accuracy")
    for asked, stopped, evaluated in ((1, 2, []), (3, 4, [3]), (5, 6, [3, 6])):
        command = [sys.executable, "-m", "tests.training.stall", str(stage), f"run={run}", *words]
        env = environment() | {"STALL": f"{asked} 0 ask"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 85, done.stdout + done.stderr
        assert f"committed the checkpoint of step {stopped}" in done.stdout
        lines = records(run / "evaluations.jsonl") if evaluated else []
        assert [line["step"] for line in lines] == evaluated
    fine_tune(alone, stage, run, *words)
    assert [line["step"] for line in records(run / "evaluations.jsonl")] == [3, 6, 7]
