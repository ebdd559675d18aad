from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.errors import ConfigError, MmscaleError, SourceError
from shards.read import ShardReader
from shards.sample import Sample
from shards.write import write_shards
from tests.shards import published
from tests.shards.published import write_json


def written(path: Path, source: str, *words: str) -> dict[str, Sample]:
    """What `mmscale shards write source=... path=... words` makes of it, by key."""
    out = path.parent / f"out-{len(words)}"
    config = configfile.load(WriteConfig, None, [f"source={source}", f"path={path}", f"out={out}", "processes=1", *words])
    write_shards(config, progress=False)
    reader = ShardReader(out)
    samples = [reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]
    return {sample.key: sample for sample in samples}


def test_coco_captions_with_tags(tmp_path: Path) -> None:
    path = published.coco(tmp_path)
    samples = written(
        path,
        "coco",
        f"annotations.instances={path.parent / 'instances_val2017.json'}",
        "quarantine.max_count=1",
        "quarantine.max_fraction=1",
    )
    assert list(samples) == ["000000397133", "000000037777"]  # the third has no caption
    first, second = samples.values()
    assert first.captions() == ["A man is in a kitchen making pizzas.", "Man in apron standing on front of oven with pans."]
    assert first.image() == ("jpg", (tmp_path / "val2017" / "000000397133.jpg").read_bytes())
    assert [s.fields()["tags"] for s in (first, second)] == [["person", "bottle"], []]
    assert first.fields()["image_id"] == 397133


def test_coco_instances_alone(tmp_path: Path) -> None:
    path = published.coco(tmp_path).with_name("instances_val2017.json")
    samples = written(path, "coco", "caption.required=false")
    assert [sample.fields()["tags"] for sample in samples.values()] == [["person", "bottle"], [], ["person"]]


def test_karpathy_splits(tmp_path: Path) -> None:
    path = published.flickr30k(tmp_path)
    samples = written(path, "karpathy", "annotations.splits=[train]")
    assert list(samples) == ["1000092795", "1000092797"]
    assert [len(sample.captions()) for sample in samples.values()] == [5, 4]
    assert samples["1000092795"].fields()["split"] == "train"
    assert samples["1000092795"].captions()[1] == "Two young guys with shaggy hair, said 1."
    assert len(written(path, "karpathy")) == 3
    with pytest.raises(ConfigError, match=r"`annotations.splits`: .* has no 'val'; it has test, train\. Name some of them\."):
        written(path, "karpathy", "annotations.splits=[val]", "rows_per_shard=1")


def test_vqa(tmp_path: Path) -> None:
    samples = written(published.vqa(tmp_path), "vqa")
    assert list(samples) == ["262148000", "262148001"]
    first, second = (sample.fields() for sample in samples.values())
    assert (first["question"], first["answer"], first["question_type"]) == ("Where is he looking?", "down", "where is")
    assert first["answers"].count("down") == 7
    assert (second["answer"], second["answers"][0]) == ("10", "Ten.")
    assert samples["262148000"].image() is not None


def test_vqa_of_a_test_split_has_no_answers(tmp_path: Path) -> None:
    samples = written(published.vqa(tmp_path, "test-dev2015", answers=False), "vqa")
    assert [set(sample.fields()) & {"question", "answer"} for sample in samples.values()] == [{"question"}] * 2


def test_a_question_without_answers_is_quarantined(tmp_path: Path) -> None:
    path = published.vqa(tmp_path)
    answers = configfile.read_yaml(path.with_name("v2_mscoco_val2014_annotations.json"))
    write_json(tmp_path / "fewer.json", answers | {"annotations": answers["annotations"][:1]})
    config = configfile.load(
        WriteConfig,
        None,
        [
            "source=vqa",
            f"path={path}",
            f"out={tmp_path / 'o'}",
            f"annotations.answers={tmp_path / 'fewer.json'}",
            "quarantine.max_fraction=1",
        ],
    )
    assert write_shards(config, progress=False).quarantined == {"bad_row": 1}


def test_nlvr2_is_two_pictures_a_sample(tmp_path: Path) -> None:
    samples = written(published.nlvr2(tmp_path), "nlvr")
    assert list(samples) == ["dev-850-0-0", "dev-850-0-1"]
    first, second = samples.values()
    assert [first.fields()[key] for key in ("sentence", "label")] == ["The right image shows a walkway.", "false"]
    assert second.fields()["label"] == "true"
    assert [sample.fields()["group"] for sample in (first, second)] == ["dev-850-0", "dev-850-1"]
    assert sorted(first.parts) == ["000.png", "001.jpg", "json"]
    assert first.parts["001.jpg"] == (tmp_path / "dev" / "dev-850-0-img1.png").read_bytes()
    assert first.image() is None


def test_nlvr_is_a_sample_a_permutation(tmp_path: Path) -> None:
    samples = written(published.nlvr(tmp_path), "nlvr")
    assert list(samples) == [f"dev-1572-0-{number}" for number in range(6)]
    fields = samples["dev-1572-0-5"].fields()
    assert [fields[key] for key in ("sentence", "label", "group", "width")] == [
        "There is a tower with four blocks.",
        "true",
        "dev-1572",
        45,
    ]


def test_esc50_folds(tmp_path: Path) -> None:
    samples = written(published.esc50(tmp_path / "ESC-50"), "esc50", "annotations.splits=[1]")
    assert list(samples) == ["1-100032-A-0", "1-17367-A-1"]
    fields = samples["1-100032-A-0"].fields()
    assert [fields[key] for key in ("label", "category", "fold", "target", "duration_s")] == ["dog", "dog", 1, "0", pytest.approx(0.1)]
    assert "wav" in samples["1-100032-A-0"].parts


def test_urbansound8k_has_a_folder_a_fold(tmp_path: Path) -> None:
    samples = written(published.urbansound8k(tmp_path / "UrbanSound8K"), "esc50")
    assert [sample.fields()["label"] for sample in samples.values()] == ["dog_bark", "children_playing"]


def refusals() -> list[tuple[str, Callable[[Path], tuple[Path, list[str]]], str]]:
    def json_at(content: Any) -> Callable[[Path], tuple[Path, list[str]]]:
        return lambda root: (write_json(root / "a" / "captions_x.json", content), [f"annotations.images={root}"])

    def text_at(text: str) -> Callable[[Path], tuple[Path, list[str]]]:
        def make(root: Path) -> tuple[Path, list[str]]:
            (root / "dev.json").write_text(text)
            return root / "dev.json", []

        return make

    images = [{"id": 1, "file_name": "1.jpg"}]
    return [
        ("coco", json_at({"images": []}), r"is no COCO annotation file: it has no list `annotations`; it holds images\."),
        ("coco", json_at([1]), r"is no COCO annotation file: it has no list `images`; it holds a list\."),
        (
            "coco",
            json_at({"images": images, "annotations": [{"image_id": 2, "caption": "c"}]}),
            r"is of image 2, which `images` does not list",
        ),
        ("coco", json_at({"images": images, "annotations": [{"image_id": 1}]}), r"Entry 0 of `annotations` in .* has no `caption`"),
        (
            "coco",
            lambda root: (write_json(root / "a" / "captions_x.json", {}), []),
            r"usual places, '.*/x', .* Set annotations\.images to their folder",
        ),
        ("coco", lambda root: (root / "none.json", [f"annotations.images={root}"]), r"There is no COCO annotation file at '.*none\.json'"),
        ("vqa", lambda root: (root / "none.json", []), r"There is no file at '.*none\.json'\. Give the `path` of the annotations\."),
        (
            "coco",
            json_at({"images": [{"id": [1], "file_name": "1.jpg"}], "annotations": []}),
            r"Entry 0 of `images` in .* has a `id` that is neither a number nor a text",
        ),
        ("karpathy", json_at({"images": [{"filename": "1.jpg", "sentences": []}]}), r"Entry 0 of `images` in .* has no `split`"),
        (
            "vqa",
            json_at({"questions": [], "data_subtype": "val2014"}),
            r"The answers to .* Set annotations\.answers to the VQA annotation file",
        ),
        ("nlvr", text_at("{'sentence'"), r"is no NLVR file of a json object a line: it is not JSON"),
        ("nlvr", text_at('{"sentence": "a"}\n'), r"Line 1 of .* is no NLVR example: it needs `identifier` and `sentence`"),
        ("nlvr", text_at(""), r"is empty\. Give another `path`\."),
        ("esc50", lambda root: (root, []), r"There is no csv file in meta/ or metadata/ of"),
    ]


@pytest.mark.parametrize(("source", "make", "said"), refusals())
def test_refused_in_one_paragraph(tmp_path: Path, source: str, make: Callable[[Path], tuple[Path, list[str]]], said: str) -> None:
    path, words = make(tmp_path)
    with pytest.raises(MmscaleError, match=said) as refused:
        written(path, source, *words)
    assert "\n" not in str(refused.value)


def test_a_table_that_is_no_list_of_recordings(tmp_path: Path) -> None:
    root = published.esc50(tmp_path)
    (root / "meta" / "esc50.csv").write_text("file,fold\na.wav,1\n")
    with pytest.raises(SourceError, match=r"it has no column filename or slice_file_name; it has file, fold\. Any other table is read by"):
        written(root, "esc50")


def test_a_picture_that_is_missing_is_quarantined(tmp_path: Path) -> None:
    path = published.nlvr2(tmp_path)
    (tmp_path / "dev" / "dev-850-0-img1.png").unlink()
    with pytest.raises(MmscaleError, match=r"2 of 2 samples were quarantined \(2 missing_file\)"):
        written(path, "nlvr")
