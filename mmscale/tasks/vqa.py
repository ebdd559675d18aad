"""Visual question answering over a closed vocabulary of answers: classification whose text is the question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mmscale.data.labels import label_of
from mmscale.tasks.classification import Classification, label_kind
from mmscale.tasks.task import Metrics, Record
from shards.answers import answer_accuracy


class Vqa(Classification):
    """Where samples have the answers of several people, as in VQA v2, the most common one is the label and all of them score."""

    def kept_of(self, fields: dict[str, Any]) -> Record:
        """Records have `answers`, and `answer_type` where the samples do."""
        return answers_of(fields, self.label) if isinstance(fields.get(self.label), list) else {}

    def score(self, records: Sequence[Record]) -> Metrics:
        """As `Classification`, and the VQA accuracy where people's answers are known."""
        return {**super().score(records), **(vqa_accuracy(records) if all("answers" in r for r in records) else {})}


def answers_of(fields: dict[str, object], name: str) -> Record:
    """What a sample's json says of its answers: `answers`, texts, and `answer_type` where it is there."""
    value = fields.get(name)
    given = value if isinstance(value, list) else [value]
    kind = {"answer_type": str(fields["answer_type"])} if fields.get("answer_type") is not None else {}
    return {"answers": [answer for answer in map(label_of, given) if answer is not None], **kind}


def vqa_accuracy(records: Sequence[Record]) -> dict[str, float]:
    """The official accuracy (`shards.answers.answer_accuracy`) over all records, and over those of each `answer_type`."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for record in records:
        value = answer_accuracy(record["prediction"], record["answers"])
        by_kind["vqa_accuracy"].append(value)
        if "answer_type" in record:
            by_kind[f"vqa_accuracy_{record['answer_type'].replace('/', '_')}"].append(value)
    return {name: sum(values) / len(values) for name, values in sorted(by_kind.items())}


KIND = label_kind("vqa", Vqa)
