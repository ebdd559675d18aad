"""Pictures of an evaluation: what is counted, and that odd records can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmscale.data.dataset import ShardDataset
from mmscale.pictures import confusion, draw_confusion, draw_examples
from mmscale.tasks import Record
from tests.data.tiny import caption, image_bytes, write


def record(label: str, prediction: str, position: int = 0) -> Record:
    return {"label": label, "prediction": prediction, "confidence": 0.5, "position": position, "key": "k"}


def test_confusion_by_hand() -> None:
    records = [record("b", "b"), record("b", "a"), record("b", "z"), record("a", "a"), record("a", "a"), record("c", "b")]
    names, counts = confusion(records, 40)
    assert names == ["b", "a", "c", "z"]
    assert counts.tolist() == [[1, 1, 0, 1], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    names, counts = confusion(records, 2)
    assert names == ["b", "a", "2 others"]
    assert counts.tolist() == [[1, 1, 1], [0, 2, 0], [1, 0, 0]]


def test_as_many_labels_as_have_a_row_leave_no_others() -> None:
    names, counts = confusion([record(str(i), str(i)) for i in range(40)], 40)
    assert len(names) == 40
    assert np.array_equal(counts, np.eye(40))


def page(index: int) -> dict[str, bytes]:
    """Of three samples one has no image."""
    text = {"txt": f"${caption(index)}_^$ {'word ' * 50}".encode()}
    return text | ({"jpg": image_bytes(index)} if index % 3 else {})


@pytest.mark.parametrize("right", [0, 3, 8])
def test_any_records_can_be_drawn(tmp_path: Path, right: int) -> None:
    """A formula's signs, long texts, samples without an image, none right, none wrong."""
    shards = write(tmp_path / "d", page)
    records = [record("$x^2$ \\frac", "$x^2$ \\frac" if i < right else "a " * 50, i) for i in range(8)]
    draw_examples(records, ShardDataset(shards), tmp_path / "examples.png", text="caption")
    draw_confusion(records, tmp_path / "confusion.png")
    for name, least in (("examples", 300), ("confusion", 250)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > least
            assert np.ptp(np.asarray(picture.convert("L"))) > 200
