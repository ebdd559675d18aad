"""Patches of decoded items to ragged streams: which are kept, which are hidden, where they stand. Randomness is keyed by (seed, position).

Shape letters: S items, T patches of a stream, P patches of an item, K patches kept, C numbers in a patch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.data.batch import PatchStream
from mmscale.data.example import Example
from mmscale.data.keyed import Purpose, purpose_of, uniform
from mmscale.data_config import Schedule

BYTES_A_PATCH = 3 * 8 + 1
"""Of a stream's tensors besides the values: coordinates and mask."""
BYTES_AN_ITEM = 4 + 8 + 3 * 8
"""Offset, row and grid."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """Draws patches of one modality's items: those that the model sees, and those of them that are hidden."""

    name: str
    """The modality."""
    seed: int
    """The run's seed."""
    keep: Schedule | None
    """Part that is kept; None keeps all."""
    mask: float
    """Part of the kept patches that is hidden in a chosen item."""

    def keeps_all(self, position: int) -> bool:
        """Whether an item is seen whole."""
        return self._part(position) >= 1.0

    def kept(self, positions_S: NDArray[np.int64], patches: int) -> NDArray[np.int64]:
        """Patches kept of items of equally many patches and equal part, ascending; int64 (S, K), K >= 1.

        Source: Li et al. 2023 (FLIP), section 3.
        """
        count = max(1, round(self._part(int(positions_S[0])) * patches)) if len(positions_S) else patches
        draws_SP = uniform(self.seed, positions_S, purpose_of(Purpose.KEEP, self.name), patches)
        return np.sort(np.argsort(draws_SP, axis=1, kind="stable")[:, :count], axis=1)

    def hidden(self, positions_S: NDArray[np.int64], chosen_S: NDArray[np.bool_], patches: int) -> NDArray[np.bool_]:
        """Hide the same number of patches of each chosen item of equally many patches; bool (S, patches)."""
        mask_SP = np.zeros((len(positions_S), patches), dtype=bool)
        hidden = round(self.mask * patches)
        if hidden and chosen_S.any():
            draws_SP = uniform(self.seed, positions_S, purpose_of(Purpose.PATCH_MASK, self.name), patches)
            np.put_along_axis(mask_SP, np.argsort(draws_SP, axis=1, kind="stable")[:, :hidden], True, axis=1)
            mask_SP &= chosen_S[:, None]
        return mask_SP

    def _part(self, position: int) -> float:
        if self.keep is None:
            return 1.0
        return self.keep[bisect.bisect_right([first for first, _ in self.keep], position) - 1][1]


def gather_stream(
    chooser: Chooser, examples: Sequence[Example], positions_M: NDArray[np.int64], chosen_M: NDArray[np.bool_], region_TC: NDArray[Any]
) -> PatchStream:
    """Move the kept patches of all items together.

    Args:
        chooser: of the modality.
        examples: M of them.
        positions_M: their positions.
        chosen_M: whose patches may be hidden.
        region_TC: memory for the patches. Items may lie in it already, in the order of the examples; the values are a view of it.
    """
    rows = [row for row, example in enumerate(examples) if chooser.name in example.items]
    coordinates, masks, cu_seqlens = [np.empty((0, 3), np.int64)], [np.empty(0, bool)], [0]
    for row in rows:
        item, position_1 = examples[row].items[chooser.name], positions_M[row : row + 1]
        place_P3, values_PC = grid_coordinates(item.grid), item.values_PC
        if not chooser.keeps_all(int(position_1[0])):
            kept_K = chooser.kept(position_1, len(values_PC))[0]
            place_P3, values_PC = place_P3[kept_K], values_PC[kept_K]
        begin, end = cu_seqlens[-1], cu_seqlens[-1] + len(values_PC)
        if region_TC[begin:end].__array_interface__["data"] != values_PC.__array_interface__["data"]:
            region_TC[begin:end] = values_PC
        coordinates.append(place_P3)
        masks.append(chooser.hidden(position_1, chosen_M[row : row + 1], len(values_PC))[0])
        cu_seqlens.append(end)
    grids = [examples[row].items[chooser.name].grid for row in rows]
    return PatchStream(
        values_TC=torch.from_numpy(region_TC[: cu_seqlens[-1]]),
        cu_seqlens_S1=torch.tensor(cu_seqlens, dtype=torch.int32),
        rows_S=torch.tensor(rows, dtype=torch.int64),
        coordinates_T3=torch.from_numpy(np.concatenate(coordinates)),
        grids_S3=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        mask_T=torch.from_numpy(np.concatenate(masks)),
    )


@lru_cache(maxsize=4096)
def grid_coordinates(grid: tuple[int, int, int]) -> NDArray[np.int64]:
    """Place of each patch of a grid, in the order (time, height, width); int64 (P, 3)."""
    return np.stack(np.unravel_index(np.arange(grid[0] * grid[1] * grid[2]), grid), axis=1).astype(np.int64)
