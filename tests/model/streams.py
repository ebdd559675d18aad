"""Batches with items of every modality, made by hand."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mmscale.data.batch import Batch, PatchStream
from mmscale.data.patches import grid_coordinates
from mmscale.modalities.modality import Grid, Modality
from mmscale.model import MMScaleModel
from tests.model.tiny import Row, make_batch

MODALITIES = {
    "audio": {"mels": 16, "patch": 8, "max_seconds": 0.4},
    "video": {"frames": 4, "tubelet": 2},
    "other": {"kind": "tests.modalities.series:Series"},
}
"""Beside square images; all share an expert."""
NATIVE = {"image": {"max_tokens": 9}, **MODALITIES, "audio": {**MODALITIES["audio"], "expert": "ears"}}
"""Images in their own shape, and sound with an expert of its own."""
GRIDS: dict[str, list[Grid | None]] = {
    "image": [(1, 2, 2), (1, 3, 2), None, None, (1, 1, 7), None, None, None],
    "audio": [None, (5, 2, 1), (3, 2, 1), None, (1, 2, 1), None, None, None],
    "video": [(2, 2, 2), None, None, (1, 2, 2), (2, 2, 2), None, None, None],
    "other": [None, None, None, None, (3, 1, 1), (8, 1, 1), None, None],
}
"""Grid of each row's item of each modality."""
WORDS = (10, 11, 12)
ROWS = [
    Row(False),
    Row(False, caption=(5,), text=(6, 7), label=1),
    Row(False, caption=(20, 21)),
    Row(False, caption=None),
    Row(False, text=None, label=2),
    Row(False, caption=None, text=None, label=0),
    Row(False, caption=(30, 31, 32, 33)),
    Row(False, caption=None, text=None),
]
"""Their captions and texts: pairs, items without text, text without items, nothing."""


def stream(name: str, modality: Modality, grids: Sequence[Grid | None], first: int = 0, masked: bool = True) -> PatchStream:
    """Values and masks depend on the modality and the position alone."""
    values, masks, places, rows, lengths = [], [], [], [], [0]
    for row, grid in enumerate(grids):
        if grid is None:
            continue
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()) % 1000 + 7 * (first + row))
        place = torch.from_numpy(grid_coordinates(grid))
        shape = (len(place), modality.values)
        bytes_ = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        values.append(bytes_ if modality.dtype == "uint8" else torch.randn(shape, generator=g))
        masks.append((torch.rand(len(place), generator=g) < 0.5) & masked)
        places.append(place)
        rows.append(row)
        lengths.append(len(place))
    none = torch.zeros(0, dtype=torch.int64)
    return PatchStream(
        values_TC=torch.cat([torch.zeros(0, modality.values, dtype=getattr(torch, modality.dtype)), *values]),
        cu_seqlens_S1=torch.tensor(lengths).cumsum(0).int(),
        rows_S=torch.tensor(rows, dtype=torch.int64),
        coordinates_T3=torch.cat([none.view(0, 3), *places]),
        grids_S3=torch.tensor([g for g in grids if g is not None], dtype=torch.int64).view(-1, 3),
        mask_T=torch.cat([none.bool(), *masks]),
    )


def stream_batch(
    model: MMScaleModel,
    rows: Sequence[Row] = ROWS,
    grids: Mapping[str, Sequence[Grid | None]] = GRIDS,
    first: int = 0,
    masked: bool = True,
) -> Batch:
    """Rows with their items of the model's modalities; square images besides where the model takes them."""
    if "image" not in model.modalities:
        rows = [replace(row, image=grids["image"][i] is not None) for i, row in enumerate(rows)]
    batch = make_batch(rows, first=first, mask_images=masked)
    batch.streams = {name: stream(name, m, grids[name], first, masked) for name, m in model.modalities.items()}
    return batch


def one(row: int) -> tuple[list[Row], dict[str, list[Grid | None]]]:
    """One of the rows alone."""
    return [ROWS[row]], {name: [grids[row]] for name, grids in GRIDS.items()}
