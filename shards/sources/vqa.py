"""VQA v2 (and v1): a json of questions, a json of ten answers each, COCO's images. Source: Goyal et al. 2017; https://visualqa.org."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.answers import normalise_answer
from shards.config import WriteConfig
from shards.errors import SourceError
from shards.sources.annotated import AnnotatedSource, Entry, each, media_folder, read_json
from shards.sources.record import Record, refuse_shared_keys, safe_key

QUESTIONS, ANSWERS = "VQA question file", "VQA annotation file"


class VqaSource(AnnotatedSource):
    """One sample a question.

    Its fields: `question`; `answers`, the ten as they were given, which the official accuracy compares with; `answer`, the most common
    one in the official normal form, to train on; `question_type`, `answer_type`, `question_id`, `image_id`.
    """

    def __init__(self, config: WriteConfig) -> None:
        self._path = Path(config.path or "")
        kind, _, split = self._path.stem.removesuffix("_questions").rpartition("_")
        root, folder = self._path.parent.parent, _of_images(split)
        usual = (root / "Images" / kind.rpartition("_")[2] / folder, root / "Images" / folder, root / folder, self._path.parent / folder)
        super().__init__(config, media_folder(config, usual))

    def records(self) -> list[Record]:
        """List the questions in the file's order."""
        content = read_json(self._path, QUESTIONS, ("questions",))
        kind, split = (str(content.get(key, "")) for key in ("data_type", "data_subtype"))
        start, end = ("COCO", "jpg") if kind == "mscoco" else (kind, "png")
        answers = self._answers(split)
        listed = []
        for question in each(content, "questions", ("image_id", "question", "question_id"), self._path):
            identity, image = question["question_id"], question["image_id"]
            fields = {"question": str(question["question"]), "question_id": identity, "image_id": image}
            problem = None
            if answers is not None and identity in answers:
                fields |= answers[identity]
            elif answers is not None:
                problem = ("bad_row", f"The annotations hold no answer to question {identity}.")
            entry = Entry(images=(f"{start}_{_of_images(split)}_{image!s:0>12}.{end}",), fields=fields)
            listed.append(Record(safe_key(str(identity)), f"{self._path.name}:{identity}", entry, problem))
        if not listed:
            raise SourceError(f"The {QUESTIONS} {str(self._path)!r} holds no question. Give another `path`.")
        return refuse_shared_keys(listed)

    def _answers(self, split: str) -> dict[Any, dict[str, Any]] | None:
        """What is known of each question; None for the test splits, whose answers are kept by their makers."""
        given = self._config.annotations.answers
        usual = self._path.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("_questions", "_annotations")
        places = [Path(given)] if given else [self._path.parent / usual, self._path.parent.parent / "Annotations" / usual]
        path = next((place for place in places if place.is_file() and place != self._path), None)
        if path is None:
            if split.startswith("test") and not given:
                return None
            looked = ", ".join(repr(str(place)) for place in places)
            raise SourceError(f"The answers to {str(self._path)!r} are not at {looked}. Set annotations.answers to the {ANSWERS}.")
        content = read_json(path, ANSWERS, ("annotations",))
        found = {}
        for entry in each(content, "annotations", ("question_id", "answers", "multiple_choice_answer"), path):
            fields: dict[str, Any] = {key: entry[key] for key in ("question_type", "answer_type") if key in entry}
            fields["answers"] = [str(answer["answer"]) for answer in each(entry, "answers", ("answer",), path)]
            fields["answer"] = normalise_answer(str(entry["multiple_choice_answer"]))
            found[entry["question_id"]] = fields
        return found


def _of_images(split: str) -> str:
    """The questions of test-dev are about images of test."""
    return split.replace("-dev", "")
