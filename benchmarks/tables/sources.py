"""Turns published data sets, as they lie on disk, into the tables that `mmscale shards write source=table` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DATA = REPOSITORY.parent / "shared" / "data"


def data_folder(name: str) -> Path:
    """Find a data set; ends the program with a reason where it is absent."""
    folder = DATA / name
    if not folder.is_dir():
        raise SystemExit(f"skipped: the data set {name!r} is not at hand ({folder})")
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, str | int | list[str]]]) -> None:
    """Write a jsonl table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows), encoding="utf-8")


def easy_vqa(out: Path) -> dict[str, Path]:
    """One row a question of easy-VQA; the images are used where they lie."""
    source, tables = data_folder("easy-vqa"), {}
    for split in ("train", "test"):
        questions = json.loads((source / split / "questions.json").read_text())
        tables[split] = out / f"{split}.jsonl"
        rows = (
            {
                "image": str(source / split / "images" / f"{image}.png"),
                "question": question,
                "answer": answer,
                "caption": f"{question} {answer}",
            }
            for question, answer, image in questions
        )
        write_rows(tables[split], rows)
    return tables


def shapes(out: Path) -> dict[str, Path]:
    """One row an example of SHAPES: `train` is train.large with its reconstructed images, `val` the original validation split."""
    source, tables = data_folder("shapes"), {}
    with np.load(source / "reconstructed-train" / "train.large.input.recon.npz") as archive:
        pictures = {"train": archive["images"]}
    pictures["val"] = np.load(source / "val.input.npy")
    for split, name in (("train", "train.large"), ("val", "val")):
        questions = (source / f"{name}.query_str.txt").read_text().splitlines()
        answers = (source / f"{name}.output").read_text().split()
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for index, (picture, question, answer) in enumerate(zip(pictures[split], questions, answers, strict=True)):
            path = folder / f"{index:05d}.png"
            Image.fromarray(np.ascontiguousarray(picture[..., ::-1])).save(path)  # stored as B, G, R
            rows.append({"image": str(path), "question": question, "answer": answer, "caption": f"{question} {answer}"})
        tables[split] = out / f"{split}.jsonl"
        write_rows(tables[split], rows)
    return tables
