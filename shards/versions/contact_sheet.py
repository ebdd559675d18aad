"""A picture of groups of near duplicates, a line a group: the one that stays, then the farthest of those that go."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shards.commit import commit_bytes
from shards.manifest import Manifest, ShardInfo
from shards.report import picture_of, thumbnail
from shards.versions.rows import ShardRows

_CELL, _HEAD, _LABEL, _GAP = 128, 40, 30, 10

Place = tuple[Manifest, ShardInfo, int]
"""(data set, shard, kept row)."""


@dataclass(frozen=True, slots=True)
class Group:
    """One sample that stays and some that go in its favour."""

    members: Sequence[tuple[Place, int]]
    """(place, bits that differ from the first), the one that stays first."""
    dropped: int
    """All that go in its favour."""


def draw_groups(groups: Sequence[Group], path: Path) -> None:
    """Draw groups and commit the picture as PNG.

    Raises:
        ShardError, IntegrityError: a sample cannot be read as it was written.
    """
    columns = max(len(group.members) for group in groups)
    height = _CELL + _LABEL + _GAP
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, _HEAD + len(groups) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((_GAP, 12), "Near duplicates: the first of a line stays; bits that differ, farthest first.", fill="black", font=font)
    for line, group in enumerate(groups):
        for column, (place, distance) in enumerate(group.members):
            x, y = _GAP + column * (_CELL + _GAP), _HEAD + line * height
            key, image = _picture(place)
            sheet.paste(thumbnail(image, _CELL), (x, y))
            note = f"stays, {group.dropped:,} go" if column == 0 else f"{distance} bits"
            pen.text((x, y + _CELL + 2), note, fill="black" if column == 0 else "firebrick", font=font)
            pen.text((x, y + _CELL + 15), key if len(key) <= 20 else f"...{key[-17:]}", fill="grey", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    commit_bytes(path, buffer.getvalue())


def _picture(place: Place) -> tuple[str, Image.Image | None]:
    manifest, info, row = place
    with ShardRows(manifest.folder, info) as rows:
        sample = rows.read(row)
    return sample.key, picture_of(sample)
