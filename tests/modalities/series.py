"""A modality in one file: time series from the samples' json, for the test that adds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.modalities.modality import Change, Grid, Modality
from shards.errors import SampleError
from shards.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Series(Modality):
    """Numbers of the json field `series`, so many a patch."""

    longest: int = 32
    """Numbers that are read; a multiple of width."""
    width: int = 4
    """Numbers of a patch."""

    @property
    def values(self) -> int:
        return self.width

    @property
    def grid(self) -> Grid:
        return self.longest // self.width, 1, 1

    def read(self, sample: Sample, out_PC: NDArray[Any], change: Change) -> Grid | None:
        series = sample.fields().get("series")
        if series is None:
            return None
        if not all(isinstance(number, (int, float)) for number in series):
            raise SampleError(sample.key, "undecodable", "the series holds something else than numbers")
        patches = min(len(series), self.longest) // self.width
        out_PC[:patches] = np.reshape(series[: patches * self.width], (patches, self.width))
        return patches, 1, 1
