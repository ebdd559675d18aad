"""Retrieval, classification and captioning of samples that have sound or clips instead of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.tiny import caption, image_bytes, write
from tests.shards.recordings import clip, tone
from tests.tasks import predicting
from tests.tasks.predicting import predict, stage

MODALITIES = {"audio": {"mels": 16, "patch": 8, "max_seconds": 0.3}, "video": {"frames": 2}}


def heard(index: int) -> dict[str, bytes]:
    """By turns a sound, a clip, a picture, text alone."""
    text = {"txt": caption(index).encode(), "json": json.dumps({"answer": "red" if index % 2 else "blue"}).encode()}
    return text | ({"wav": tone(0.1 + 0.01 * index)}, {"mp4": clip(frames=2 + index)}, {"jpg": image_bytes(index)}, {})[index % 4]


@pytest.mark.parametrize("task", ["retrieval", "classification", "captioning"])
def test_sound_and_clips_are_evaluated_as_images_are(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write(tmp_path / "heard", heard, (8, 4))
    monkeypatch.setitem(predicting.MODEL, "modalities", MODALITIES)
    data = {"label": "answer", "labels": ["red", "blue"]} if task == "classification" else {}
    found = predict(tmp_path, stage(shards, task={"name": task}, data=data), labels=data.get("labels"))
    with_item = {f"s{i}" for i in range(12) if i % 4 != 3}
    assert {r["key"] for r in found} == (with_item if task != "classification" else {f"s{i}" for i in range(12)})
    if task == "retrieval":
        vectors = {r["key"]: r["image"] for r in found}
        assert len({tuple(v.round(4)) for v in vectors.values()}) == len(found)
