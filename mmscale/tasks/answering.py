"""Generative visual question answering: the answer is written after the question, freely or among given answers.

Source of the form: Cho et al. 2021 (VL-T5), section 4.1; of the choice among given answers: Li et al. 2021 (ALBEF), section 5.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

import numpy as np

from mmscale.config import RunConfig
from mmscale.data.batch import Batch
from mmscale.data.dataset import ShardDataset
from mmscale.data.labels import label_of, label_vocabulary
from mmscale.data.targets import Facts
from mmscale.data.tokenize import TextTokenizer
from mmscale.model import MMScaleModel
from mmscale.model.search import Trie
from mmscale.objectives.captioning import Captioning as CaptioningObjective
from mmscale.tasks.evaluated import Evaluated
from mmscale.tasks.fields import caption_field, prompt_field, target_field
from mmscale.tasks.kinds import TaskKind
from mmscale.tasks.task import Metrics, Record, Resampler, mean_of_resamples, record_of, texts_of
from mmscale.tasks.vqa import answers_of, vqa_accuracy
from mmscale.tasks.writing import Writing
from shards.answers import answer_accuracy, answer_form
from shards.errors import ConfigError

NO_IMAGE = "it has a question and an answer, but no image (nor an item of another modality) to write about"
NO_QUESTION = "it has an answer and an image, but no question"
"""Why a sample is left out."""
ANY = 1_000_000
"""Tokens of a text that is not to be cut."""


class Answering:
    """Writes an answer to each question.

    Args:
        label: json field of the right answers: one, or those of several people.
        writing: how; its prompt is the question.
        listed: write one of the answers that the model's configuration keeps.
    """

    name = "answering"
    main_metric = "vqa_accuracy"

    def __init__(self, label: str, writing: Writing, listed: bool) -> None:
        self.label = label
        self.writing = writing
        self.listed = listed
        self._texts: Trie | None = None

    def predict(self, model: MMScaleModel, batch: Batch, tokenizer: TextTokenizer) -> list[Record]:
        """Write for each sample that has a question, an answer and something to show."""
        if self.listed and self._texts is None:
            self._texts = _trie(model, tokenizer, batch)
        written = self.writing.write(model, batch, tokenizer, self._texts)
        records: list[Record] = []
        for row, fields in enumerate(batch.fields):
            found, question = answers_of(fields, self.label), texts_of(fields, self.writing.prompt or "")
            if not found["answers"]:
                continue
            if row not in written or not question:
                records.append(record_of(batch, row, left_out=NO_QUESTION if row in written else NO_IMAGE))
                continue
            records.append(record_of(batch, row, question=question[0], prediction=written[row], **found))
        return records

    def score(self, records: Sequence[Record]) -> Metrics:
        """VQA accuracy, also by type of answer, and how often the answer equals one of the given ones in the normal form."""
        exact = [answer_form(r["prediction"]) in set(map(answer_form, r["answers"])) for r in records]
        return {**vqa_accuracy(records), "any_match": sum(exact) / len(exact), "samples": float(len(records))}

    def resampler(self, records: Sequence[Record]) -> Resampler:
        """VQA accuracy of resamples."""
        return mean_of_resamples(np.array([answer_accuracy(r["prediction"], r["answers"]) for r in records]))


def _trie(model: MMScaleModel, tokenizer: TextTokenizer, batch: Batch) -> Trie:
    return Trie(_answers(model.config.id2label.values(), tokenizer, model.config.max_text_tokens), batch.positions_M.device)


def _answers(texts: Collection[str], tokenizer: TextTokenizer, most: int) -> list[list[int]]:
    """Token ids of the answers to choose from, where each fits beside a question."""
    ids = [tokenizer.encode(text, ANY)[tokenizer.begin is not None :] for text in texts]
    text, longest = max(zip(texts, ids, strict=True), key=lambda pair: len(pair[1]))
    if 2 * len(longest) >= most:
        raise ConfigError(
            f"`task.answers=listed`: the answer {textwrap.shorten(text, 200, placeholder='...')!r} has {len(longest)} tokens; it "
            f"must have less than half of model.max_text_tokens = {most}, as the other half is the question's. Train with "
            "`data.labels` that leaves it out, or with a larger model.max_text_tokens; a trained model writes freely with free=true."
        )
    return ids


def _study(config: RunConfig, dataset: ShardDataset) -> Facts:
    """The answers to choose from: `data.labels`, or all of the training shards in the normal form."""
    if config.task is None or config.task.answers == "free":
        return Facts()
    if config.data.labels:
        return Facts(labels=tuple(config.data.labels))
    found = {answer_form(text) for text in label_vocabulary(dataset.reader, target_field(config))}
    return Facts(labels=tuple(sorted(found - {""})))


def _check(config: RunConfig, facts: Facts, tokenizer: TextTokenizer) -> None:
    """Find an answer that is too long before the first step, not at the first evaluation."""
    if facts.labels:
        _answers(facts.labels, tokenizer, config.model.max_text_tokens)


def _draw(found: Evaluated) -> None:
    """Draw right and wrong examples, and what they look at; right is an answer that somebody gave, the percentage its VQA accuracy."""
    from mmscale.pictures import draw_examples

    drawn = []
    for record in found.records:
        accuracy, said = answer_accuracy(record["prediction"], record["answers"]), record["prediction"]
        drawn.append(record | {"confidence": accuracy, "label": said if accuracy > 0 else label_of(record["answers"])})
    draw_examples(drawn, found.dataset, found.out / "examples.png", text=found.config.data.prompt)
    found.draw_attention(drawn, text=found.config.data.prompt, written=True)


def _build(config: RunConfig) -> Answering:
    caption_field(config)
    prompt_field(config)
    listed = config.task is not None and config.task.answers == "listed"
    return Answering(target_field(config), Writing.of(config), listed)


KIND = TaskKind(
    name="answering",
    build=_build,
    objective=lambda task: CaptioningObjective(weight=task.weight),
    caption=True,
    writes=True,
    study=_study,
    check=_check,
    draw=_draw,
)
