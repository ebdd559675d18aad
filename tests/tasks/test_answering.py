import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.config import load_run_config
from mmscale.data.batch import IGNORE
from mmscale.data.dataset import ShardDataset
from mmscale.data.targets import Facts
from mmscale.evaluate import EvaluateCommand, evaluation_config
from mmscale.tasks import build_task, study
from mmscale.tasks.answering import KIND, NO_IMAGE, NO_QUESTION, Answering
from mmscale.tasks.vqa import Vqa, answers_of
from mmscale.tasks.writing import Writing
from shards import configfile
from shards.answers import answer_accuracy
from shards.errors import ConfigError, DataError
from tests.data.tiny import WORDS, caption, collator, image_bytes, write
from tests.tasks.predicting import predict, stage

LAYERS: dict[str, Any] = {"data": {"caption": "answer", "prompt": "question", "label": "answers"}, "task": {"name": "answering"}}


def asked(index: int) -> dict[str, bytes]:
    """By turns: a question with ten answers, one without an image, an image without a question, one without an answer."""
    answers = [WORDS[index % 3]] * 6 + ["a " + WORDS[(index + 1) % 3]] * 4
    fields = {"question": caption(index), "answer": answers[0], "answers": answers, "answer_type": ["other", "yes/no"][index // 4 % 2]}
    image = {"jpg": image_bytes(index)}
    taken = [(), (), ("question",), ("answer", "answers")][index % 4]
    found = {"json": json.dumps({k: v for k, v in fields.items() if k not in taken}).encode()}
    return found if index % 4 == 1 else image | found


def record(prediction: str, *answers: str, **more: str) -> dict[str, Any]:
    return {"prediction": prediction, "answers": list(answers)} | more


def test_answers_are_written_after_questions(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", asked)
    found = predict(tmp_path, stage(shards, **LAYERS))
    assert {int(r["key"][1:]) % 4 for r in found} == {0}
    assert all(len(r["answers"]) == 10 and isinstance(r["prediction"], str) for r in found)
    assert [r["question"] for r in found] == [caption(int(r["key"][1:])) for r in found]
    again = predict(tmp_path, stage(shards, **LAYERS), batch=1)
    assert [r["prediction"] for r in again] == [r["prediction"] for r in found]


@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}])
def test_only_listed_answers_are_written_whatever_the_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    shards = write(tmp_path / "shards", asked)
    config = stage(shards, data=LAYERS["data"], task={"name": "answering", "answers": "listed", **settings})
    facts = study(config, ShardDataset(shards))
    assert facts == Facts(labels=("blue", "green", "red"))
    found = predict(tmp_path, config, facts=facts)
    assert {r["prediction"] for r in found} <= set(facts.labels)
    assert predict(tmp_path, config, facts=facts, batch=2) == found


def test_scores_are_the_official_ones() -> None:
    task = Answering("answers", Writing(prompt="question"), listed=False)
    made = [record("cat", *["cat"] * 10, answer_type="other"), record("The cat.", *["cat"] * 8, "a dog", "dog", answer_type="yes/no")]
    made.append(record("dog", *["cat"] * 8, "a dog", "dog", answer_type="other"))
    last = (8 * 2 / 3 + 2 * 1 / 3) / 10
    assert task.score(made) == {
        "vqa_accuracy": pytest.approx((1 + 1 + last) / 3),
        "vqa_accuracy_other": pytest.approx((1 + last) / 2),
        "vqa_accuracy_yes_no": 1,
        "any_match": 1,
        "samples": 3,
    }
    assert task.resampler(made)(torch.eye(3).numpy()).tolist() == pytest.approx([1, 1, last])


def test_the_closed_vocabulary_has_the_official_accuracy_too(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", asked)
    config = stage(shards, data={"text": "question", "label": "answers"}, task={"name": "vqa"})
    found = predict(tmp_path, config, labels=["blue", "green", "red"])
    task = build_task(config)
    assert isinstance(task, Vqa)
    scores = task.score(found)
    assert scores["accuracy"] <= scores["vqa_accuracy"] <= 1
    assert {"vqa_accuracy_other", "vqa_accuracy_yes_no"} < set(scores)


def test_the_question_is_read_and_not_learned(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", asked)
    data = LAYERS["data"] | {"augment": {"shift": 0}, "max_text_tokens": 12}
    made = collator(tmp_path, shards, data=data, task=LAYERS["task"])
    examples = [ShardDataset(shards, shuffle=False, image_size=16)[i] for i in (0, 2)]
    stream = made(examples).caption
    tokenizer, cut = made.tokenizer, int(stream.cu_seqlens_S1[1])
    question, answer = tokenizer.encode(caption(0), 6), tokenizer.encode(WORDS[0], 9)
    assert stream.ids_T[:cut].tolist() == [*question, *answer[1:]]
    assert stream.labels_T[:cut].tolist() == [IGNORE] * (len(question) - 1) + answer[1:] + [IGNORE]
    assert stream.ids_T[cut:].tolist() == tokenizer.encode(WORDS[2], 9)
    assert stream.fuse_S.all()


@pytest.mark.parametrize(("kind", "why"), [(1, NO_IMAGE), (2, NO_QUESTION)])
def test_what_is_missing_is_named(tmp_path: Path, kind: int, why: str) -> None:
    shards = write(tmp_path / "shards", lambda i: asked(kind), (3,))
    with pytest.raises(DataError) as refused:
        predict(tmp_path, stage(shards, **LAYERS))
    assert "has what the task answering needs. s" in str(refused.value)
    assert f", for example: {why}." in str(refused.value)


def test_mistakes_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`data\.prompt` must name the json field that holds the question of the task; it is null\."):
        build_task(stage(tmp_path, data={"label": "answers", "caption": "answer"}, task={"name": "answering"}))
    path = tmp_path / "stage.yaml"
    path.write_text("run: x\ndata: {shards: y}\ntask: {name: captioning}\n")
    for words, said in (
        (["task.beams=2", "task.temperature=1"], r"`task\.temperature` = 1 draws tokens and `task\.beams` = 2 looks"),
        (["task.top_p=0"], r"`task\.top_p` must be above 0 and at most 1; got 0\."),
        (["task.top_k=-1"], r"`task\.top_k` must be at least 1, or 0 for all tokens; got -1\."),
        (["task.temperature=-1"], r"`task\.temperature` must be at least 0; got -1\."),
        (["task.rerank=-1"], r"`task\.rerank` must be at least 1, or 0 for none; got -1\."),
    ):
        with pytest.raises(ConfigError, match=said):
            load_run_config(path, words)
    command = configfile.build(EvaluateCommand, [("test", {"task": "captioning", "data": "x", "top_p": 2.0})])
    with pytest.raises(ConfigError, match=r"^`top_p` must be above 0 and at most 1; got 2\."):
        evaluation_config(stage(tmp_path), command)


def test_a_listed_answer_must_leave_room_for_the_question(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", asked)
    config = stage(shards, data=LAYERS["data"], task={"name": "answering", "answers": "listed"})
    with pytest.raises(ConfigError, match=r"^`task\.answers=listed`: the answer 'red green blue red green' has 6 tokens; it must have"):
        predict(tmp_path, config, labels=["red", "red green blue red green"])


def test_the_task_needs_no_head() -> None:
    assert KIND.head is None


def test_an_answer_that_the_normal_form_leaves_nothing_of_is_kept(tmp_path: Path) -> None:
    def choice(index: int) -> dict[str, bytes]:
        return asked(0) | {"json": json.dumps({"question": "Which?", "answers": "ABC"[index % 3]}).encode()}

    shards = write(tmp_path / "shards", choice)
    config = stage(shards, data=LAYERS["data"], task={"name": "answering", "answers": "listed"})
    assert study(config, ShardDataset(shards)) == Facts(labels=("a", "b", "c"))
    assert answer_accuracy("a", ["A"]) == 1
    assert answer_accuracy("", ["A"]) == answer_accuracy("the", ["A"]) == 0


def test_answers_that_are_truth_values_are_compared_as_labels_are() -> None:
    found = answers_of({"answers": [True] * 10, "answer_type": None}, "answers")
    assert found == {"answers": ["true"] * 10}
    assert answer_accuracy("true", found["answers"]) == 1
