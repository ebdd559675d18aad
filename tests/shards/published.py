"""Small hand-made files in the true formats of published sets, with pictures and recordings where their layouts have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.shards.pictures import encoded, gradient
from tests.shards.recordings import tone


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def picture(path: Path, width: int = 40, kind: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(gradient(width, 30), kind))
    return path


def coco(root: Path) -> Path:
    """Three images of val2017 with captions of two and instances of two; returns the file of captions."""
    info = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017}
    images = [
        {"license": 4, "file_name": f"{i:012d}.jpg", "coco_url": "http://x", "height": 30, "width": 40, "date_captured": "", "id": i}
        for i in (397133, 37777, 252219)
    ]
    for image in images:
        picture(root / "val2017" / image["file_name"])
    captions = [
        {"image_id": 397133, "id": 370509, "caption": "A man is in a kitchen making pizzas."},
        {"image_id": 37777, "id": 91, "caption": "The dining table near the kitchen has a bowl of fruit on it."},
        {"image_id": 397133, "id": 370512, "caption": "Man in apron standing on front of oven with pans."},
    ]
    box = {"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "area": 9.5, "iscrowd": 0, "bbox": [1.0, 2.0, 3.0, 4.0]}
    instances = [
        box | {"image_id": i, "category_id": c, "id": n} for n, (i, c) in enumerate([(397133, 44), (397133, 1), (397133, 44), (252219, 1)])
    ]
    categories = [{"supercategory": "person", "id": 1, "name": "person"}, {"supercategory": "kitchen", "id": 44, "name": "bottle"}]
    common = {"info": info, "licenses": [], "images": images}
    write_json(root / "annotations" / "instances_val2017.json", common | {"annotations": instances, "categories": categories})
    return write_json(root / "annotations" / "captions_val2017.json", common | {"annotations": captions})


def flickr30k(root: Path) -> Path:
    """Two images for training and one for testing, five sentences each but one."""

    def image(number: int, split: str, sentences: int) -> dict[str, Any]:
        name = picture(root / "flickr30k-images" / f"{1000092795 + number}.jpg").name
        raw = [f"Two young guys with shaggy hair, said {n}." for n in range(sentences)]
        told = [{"tokens": r.split(), "raw": r, "imgid": number, "sentid": 5 * number + n} for n, r in enumerate(raw)]
        return {"sentids": [t["sentid"] for t in told], "imgid": number, "sentences": told, "split": split, "filename": name}

    images = [image(0, "train", 5), image(1, "test", 5), image(2, "train", 4)]
    return write_json(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def vqa(root: Path, subtype: str = "val2014", answers: bool = True) -> Path:
    """Two questions about one image; returns the file of questions."""
    head = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": subtype}
    picture(root / subtype.replace("-dev", "") / f"COCO_{subtype.replace('-dev', '')}_000000262148.jpg")
    questions = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many people are there?", "question_id": 262148001},
    ]
    if answers:
        given = [["down"] * 6 + ["at table", "skateboard", "down", "table"], ["Ten."] * 7 + ["10", "ten", "many"]]
        found = [
            {
                "question_type": kind,
                "multiple_choice_answer": texts[0],
                "answers": [{"answer": t, "answer_confidence": "yes", "answer_id": n + 1} for n, t in enumerate(texts)],
                "image_id": 262148,
                "answer_type": "other",
                "question_id": 262148000 + number,
            }
            for number, (kind, texts) in enumerate(zip(("where is", "how many"), given, strict=True))
        ]
        write_json(root / "vqa" / f"v2_mscoco_{subtype}_annotations.json", head | {"annotations": found})
    name = f"v2_OpenEnded_mscoco_{subtype}_questions.json"
    return write_json(root / "vqa" / name, head | {"task_type": "Open-Ended", "questions": questions})


def nlvr2(root: Path) -> Path:
    """Two sentences about one pair of dev, the right one a JPEG named png as some are."""
    rows = [
        {
            "validation": {"61": label},
            "sentence": sentence,
            "left_url": "https://left",
            "right_url": "https://right",
            "writer": "61",
            "label": label,
            "synset": "beer bottle",
            "query": "some beer bottles38",
            "identifier": f"dev-850-0-{number}",
            "extra_validations": {"154": label},
        }
        for number, (sentence, label) in enumerate([("The right image shows a walkway.", "False"), ("A bottle is open.", "True")])
    ]
    picture(root / "dev" / "dev-850-0-img0.png", 40, "PNG")
    picture(root / "dev" / "dev-850-0-img1.png", 50)
    return json_lines(root / "data" / "dev.json", rows)


def nlvr(root: Path) -> Path:
    """One sentence about the six permutations of a picture."""
    box = [{"y_loc": 80, "type": "triangle", "color": "#0099ff", "x_loc": 80, "size": 20}]
    row = {"sentence": "There is a tower with four blocks.", "label": "true", "identifier": "1572-0", "directory": "2"}
    for number in range(6):
        picture(root / "dev" / "images" / "2" / f"dev-1572-0-{number}.png", 40 + number, "PNG")
    return json_lines(root / "dev" / "dev.json", [row | {"evals": {"r1": "true"}, "structured_rep": [box, box, box]}])


def json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def esc50(root: Path) -> Path:
    """Three recordings of two classes in three folds."""
    rows = [(1, "100032", "dog", 0, "True"), (1, "17367", "rooster", 1, "True"), (2, "100038", "chirping_birds", 14, "False")]
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold, clip, category, target, ten in rows:
        name = f"{fold}-{clip}-A-{target}.wav"
        (root / "audio").mkdir(parents=True, exist_ok=True)
        (root / "audio" / name).write_bytes(tone(0.1, 44100))
        lines.append(f"{name},{fold},{target},{category},{ten},{clip},A")
    (root / "meta").mkdir()
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return root


def urbansound8k(root: Path) -> Path:
    """Two recordings in folders of their folds."""
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for name, fold, label in [("100032-3-0-0.wav", 5, "dog_bark"), ("100263-2-0-117.wav", 10, "children_playing")]:
        (root / "audio" / f"fold{fold}").mkdir(parents=True)
        (root / "audio" / f"fold{fold}" / name).write_bytes(tone(0.1, 22050))
        lines.append(f"{name},100032,0.0,0.317551,1,{fold},3,{label}")
    (root / "metadata").mkdir()
    (root / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")
    return root
