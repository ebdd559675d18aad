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


def sentences(name: str, file: str) -> list[dict[str, str]]:
    """The rows of a file, `LABEL WORDS` a line; a key says which line it was."""
    lines = (data_folder("textcls-kim2014") / "data" / file).read_text(encoding="latin-1").rstrip("\n").split("\n")  # 0x85 ends no line
    found = [line.split(" ", 1) for line in lines]
    return [{"key": f"{name}-{i:05d}", "caption": text.strip(), "label": f"class {label}"} for i, (label, text) in enumerate(found)]


def trec(out: Path) -> dict[str, Path]:
    """The official split, and for tuning a tenth of the training part with what is left of it."""
    train, test = sentences("train", "TREC.train.all"), sentences("test", "TREC.test.all")
    return _write(out, {"train": train, "test": test} | _tuning(train))


def mr(out: Path, fold: int) -> dict[str, Path]:
    """One fold of ten as `test`, the others as `train`, and of these a tenth for tuning."""
    rows = sentences("mr", "rt-polarity.all")
    fold_of = np.empty(len(rows), int)
    fold_of[np.random.default_rng(SHUFFLE).permutation(len(rows))] = np.arange(len(rows)) % MR_FOLDS
    train = [row for row, f in zip(rows, fold_of, strict=True) if f != fold]
    test = [row for row, f in zip(rows, fold_of, strict=True) if f == fold]
    return _write(out, {"train": train, "test": test} | _tuning(train))


def _tuning(train: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    order = np.random.default_rng(SHUFFLE + 1).permutation(len(train))
    held = set(order[: len(train) // 10].tolist())
    return {
        "tuning-train": [row for i, row in enumerate(train) if i not in held],
        "tuning-test": [row for i, row in enumerate(train) if i in held],
    }


def _write(out: Path, parts: dict[str, list[dict[str, str]]]) -> dict[str, Path]:
    for part, rows in parts.items():
        write_rows(out / f"{part}.jsonl", rows)
    return {part: out / f"{part}.jsonl" for part in parts}
