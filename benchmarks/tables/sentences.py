"""The sentences of Kim 2014 (TREC, MR) as they lie on disk, as tables that `mmscale shards write source=table columns.image=null` reads.

Parts are cut by a fixed shuffle, as the sets come sorted by label or have no official parts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tables.sources import data_folder, write_rows

SHUFFLE = 2014
"""Seed of the shuffle."""
MR_FOLDS = 10
"""Of the cross-validation of MR (Pang and Lee 2005)."""
FIFTHS = 5
"""Of a training part, to tune on: one sentence in ten tells no differences below 1.5 points."""
Row = dict[str, str]


def sentences(name: str, file: str) -> list[Row]:
    """The rows of a file, `LABEL WORDS` a line; a key says which line it was."""
    lines = (data_folder("textcls-kim2014") / "data" / file).read_text(encoding="latin-1").rstrip("\n").split("\n")  # 0x85 ends no line
    found = [line.split(" ", 1) for line in lines]
    return [{"key": f"{name}-{i:05d}", "caption": text.strip(), "label": f"class {label}"} for i, (label, text) in enumerate(found)]


def trec(out: Path) -> dict[str, Path]:
    """The official split, and for tuning the fifths of the training part, each with the other four."""
    train, test = sentences("train", "TREC.train.all"), sentences("test", "TREC.test.all")
    return _write(out, {"train": train, "test": test} | _fifths(train))


def mr(out: Path, fold: int) -> dict[str, Path]:
    """One fold of ten as `test`, the others as `train`, and the fifths of these for tuning."""
    train, test = _cut(sentences("mr", "rt-polarity.all"), fold, MR_FOLDS, SHUFFLE)
    return _write(out, {"train": train, "test": test} | _fifths(train))


def _cut(rows: list[Row], part: int, parts: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Shuffle, deal out; all but one part, and that one, in the order that they came in."""
    part_of = np.empty(len(rows), int)
    part_of[np.random.default_rng(seed).permutation(len(rows))] = np.arange(len(rows)) % parts
    others = [row for row, p in zip(rows, part_of, strict=True) if p != part]
    return others, [row for row, p in zip(rows, part_of, strict=True) if p == part]


def _fifths(train: list[Row]) -> dict[str, list[Row]]:
    found = {}
    for fifth in range(FIFTHS):
        found[f"tuning-{fifth}-train"], found[f"tuning-{fifth}-test"] = _cut(train, fifth, FIFTHS, SHUFFLE + 1)
    return found


def _write(out: Path, parts: dict[str, list[Row]]) -> dict[str, Path]:
    for part, rows in parts.items():
        write_rows(out / f"{part}.jsonl", rows)
    return {part: out / f"{part}.jsonl" for part in parts}
