"""One decoded sample at its place in the order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Patches:
    """What a sample has of one modality."""

    values_PC: NDArray[Any]
    """Numbers of each patch, in the order (time, height, width)."""
    grid: tuple[int, int, int]
    """Patches along time, height and width."""


@dataclass(slots=True)
class Example:
    """One sample at its position: decoded, not augmented, not tokenized."""

    position: int
    """Global position."""
    key: str
    """The sample's key."""
    weight: float = 1.0
    """1, or 0 where the sample does not decode: then it has no image, no captions and no fields."""
    image: NDArray[np.uint8] | None = None
    """(S, S, 3) RGB, or None for a sample without one."""
    captions: list[str] = field(default_factory=list)
    """Its captions, in order."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Its json."""
    error: str | None = None
    """Why it does not decode."""
    items: dict[str, Patches] = field(default_factory=dict)
    """What it has of the modalities that were asked for."""

    def texts(self, name: str) -> list[str]:
        """Return the texts of a field, blank ones left out: the captions for `caption`, else what the json holds, one or a list."""
        if name == "caption":
            return self.captions
        value = self.fields.get(name)
        found = value if isinstance(value, list) else [value]
        return [str(v) for v in found if isinstance(v, (str, int, float)) and str(v).strip()]
