"""EmojiTwo as a table that `mmscale shards write source=table` reads, with a held-out part.

No split is published. Here every fifth picture is held out, by the hash of its code points; skin tones of one picture are near copies of
it, so they go where it goes, and are left out of the held-out part, whose pictures are then all different.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

from tables.sources import data_folder, write_rows

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
ONE_IN = 5


def emojitwo(out: Path) -> dict[str, Path]:
    """One row a picture: its CLDR name as the caption, its keywords as a list of tags."""
    source = data_folder("emojitwo")
    parts: dict[str, list[dict[str, str | list[str]]]] = {"train": [], "test": [], "tuning-train": [], "tuning-test": []}
    with (source / "emoji.tsv").open(encoding="utf-8", newline="") as lines:
        for line in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            points = Path(line["file"]).stem.split("-")
            base = "-".join(point for point in points if point not in SKIN_TONES)
            row: dict[str, str | list[str]] = {
                "key": Path(line["file"]).stem,
                "image": str(source / "png64" / line["file"]),
                "caption": line["name"],
                "keywords": [word.strip() for word in line["keywords"].split("|") if word.strip()],
            }
            draw = int(hashlib.sha256(base.encode()).hexdigest(), 16)
            is_base = base == "-".join(points)
            if draw % ONE_IN:
                parts["train"].append(row)
                tuned = draw // ONE_IN % ONE_IN
                if tuned or is_base:
                    parts["tuning-train" if tuned else "tuning-test"].append(row)
            elif is_base:
                parts["test"].append(row)
    for part, rows in parts.items():
        write_rows(out / f"{part}.jsonl", rows)
    return {part: out / f"{part}.jsonl" for part in parts}
