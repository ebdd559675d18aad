"""Pictures of an evaluation: what is counted, and that odd records can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mmscale.data.dataset import ShardDataset
from mmscale.pictures import (
    _draw_map,
    _edges,
    chosen_examples,
    confusion,
    draw_attention,
    draw_confusion,
    draw_examples,
    draw_retrieval,
    draw_scatter,
)
from mmscale.tasks import Record, captioning
from mmscale.tasks.evaluated import Evaluated
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


def test_examples_are_spread_over_all_records() -> None:
    records = [record("a", "a" if i % 2 else "b", i) for i in range(41)]
    right, wrong = chosen_examples(records, columns=3, rows=1)
    assert [r["position"] for r in right] == [1, 19, 39]
    assert [r["position"] for r in wrong] == [0, 20, 40]
    assert chosen_examples(records[1:2], columns=3, rows=1) == ([records[1]], [])


def test_attention_lies_over_the_whole_image_whatever_its_shape() -> None:
    axis = Figure().subplots()
    map_23 = np.array([[0, 0.1, 0.2], [0, 0, 0.3]], np.float32)
    _draw_map(axis, np.zeros((20, 50, 3), np.uint8), map_23, "black")
    image, laid = axis.images
    assert image.get_extent() == laid.get_extent()
    assert image.get_array().shape == (20, 50)
    assert np.array_equal(laid.get_array(), map_23)
    assert (laid.norm.vmin, laid.norm.vmax) == (0, np.float32(0.3))
    assert axis.get_xlabel() == "60% to the image, most 30.0%"


def test_attention_to_odd_records_can_be_drawn(tmp_path: Path) -> None:
    dataset, path = ShardDataset(write(tmp_path / "d", page)), tmp_path / "attention.png"
    shown = [i for i in range(8) if dataset[i].image is not None]
    records = [record("$x^2$", "$x^2$" if i < 3 else "a " * 50, i) for i in shown]
    draw_attention(records, dict.fromkeys(shown, np.eye(2, dtype=np.float32)), dataset, path, text="caption")
    with Image.open(path) as picture:
        assert min(picture.size) > 300


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


def test_captions_are_drawn_beside_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Record] = []
    monkeypatch.setattr("mmscale.pictures.draw_examples", lambda records, *_, **__: seen.extend(records))
    records = [
        {"position": 0, "prediction": "a cat", "references": ["the cat", "a cat"]},
        {"position": 1, "prediction": "abc", "references": ["xyz", "vw"]},
    ]
    dataset = ShardDataset(write(tmp_path / "d", page))
    no: Any = None
    found = Evaluated(records=records, dataset=dataset, config=no, out=tmp_path, model=no, tokenizer=no, device=torch.device("cpu"))
    assert captioning.KIND.draw is not None
    captioning.KIND.draw(found)
    assert [(r["label"], r["prediction"], r["confidence"]) for r in seen] == [("a cat", "a cat", 1.0), ("xyz", "abc", 0.0)]
    monkeypatch.undo()
    captioning.KIND.draw(found)
    with Image.open(tmp_path / "examples.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("numbers", [[], [1.0], [1.0, 2.0, 3.5], [1.0, float("nan")]])
def test_any_numbers_can_be_drawn(tmp_path: Path, numbers: list[float]) -> None:
    draw_scatter(np.array(numbers), np.array(numbers) * 2, tmp_path / "scatter.png", name="rating_$_")
    with Image.open(tmp_path / "scatter.png") as picture:
        assert min(picture.size) > 300


def test_prices_in_captions_are_no_formulas(tmp_path: Path) -> None:
    shards = write(tmp_path / "d", page)
    caption_of = ["from $5 to 10% off $20", "cost $100 & 50% of $200", "$5 ... $6"]
    records = [{"position": i, "caption": c, "text": np.eye(3)[i], "image": np.eye(3)[i]} for i, c in enumerate(caption_of)]
    draw_retrieval(records, ShardDataset(shards), tmp_path / "retrieval.png")
    with Image.open(tmp_path / "retrieval.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("scores", [[1.0, float(np.nextafter(1.0, 2.0))], [2.0, 2.0], [0.0], [1.0, 5.0]])
def test_scores_that_are_all_but_equal_have_a_histogram(scores: list[float]) -> None:
    counts, _ = np.histogram(scores, _edges(scores))
    assert counts.sum() == len(scores)
