"""Which samples a data set is to hold: a judge of sizes, captions and fields, the same while writing and afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """Which samples are left out, though nothing is wrong with them."""

    min_side: int | None = None
    """Least length in pixels of the shorter side of an image."""
    max_aspect: float | None = None
    """Largest ratio of the longer side of an image to its shorter side."""
    min_caption_chars: int | None = None
    """Least characters of the longest caption."""
    deny: list[str] = field(default_factory=list)
    """Leave out samples of which a caption holds one of these words, in any case."""


def judge(config: FilterConfig, width: int | None, height: int | None, captions: Sequence[str], fields: Mapping[str, Any]) -> str | None:
    """Say why a sample is left out, in a short stable word, or None if it stays.

    Args:
        config: what is asked of it.
        width: of its image in pixels, None without one.
        height: likewise.
        captions: all of them.
        fields: of its json.
    """
    if width is not None and height is not None:
        if config.min_side is not None and min(width, height) < config.min_side:
            return "min_side"
        if config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height):
            return "max_aspect"
    if config.min_caption_chars is not None and max(map(len, captions), default=0) < config.min_caption_chars:
        return "min_caption_chars"
    words = {word for caption in captions for word in re.findall(r"\w+", caption.casefold())}
    return "deny" if words.intersection(word.casefold() for word in config.deny) else None
