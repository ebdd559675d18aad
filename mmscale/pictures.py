"""Pictures of results, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.data.dataset import ShardDataset
from mmscale.tasks import Record

_RIGHT, _OTHER, _FAINT = "#1a9850", "#d0d0d0", "#707070"


def draw_retrieval(records: Sequence[Record], dataset: ShardDataset, path: Path, *, queries: int = 8, shown: int = 7) -> None:
    """Draw a grid: a text query a row, the images that the model ranks first, the right ones framed in green.

    Args:
        records: what the retrieval task predicted.
        dataset: the data set that the records' positions refer to.
        path: the PNG to write.
        queries: rows, spread evenly over the records.
        shown: images a row.
    """
    from matplotlib.figure import Figure

    queries, shown = min(queries, len(records)), min(shown, len(records))
    chosen = np.linspace(0, len(records) - 1, queries).astype(int)
    similarity_QC = np.stack([records[i]["text"] for i in chosen]) @ np.stack([r["image"] for r in records]).T
    figure = Figure(figsize=(3.2 + 1.05 * shown, 0.5 + 1.1 * queries), layout="constrained")
    axes = figure.subplots(queries, shown + 1, squeeze=False, gridspec_kw={"width_ratios": [3.0, *[1] * shown]})
    for row, query, similarity_C in zip(axes, chosen, similarity_QC, strict=True):
        caption, order = records[query]["caption"], np.argsort(-similarity_C, kind="stable")
        right = [records[best]["caption"] == caption for best in order]
        _draw_query(row[0], caption, right.index(True) + 1)
        for axis, best, is_right in zip(row[1:], order, right, strict=False):
            _draw_candidate(axis, records[best], dataset, similarity_C[best], is_right)
    figure.suptitle(f"Text to image among {len(records):,} candidates, best first (green: right; below: cosine)", fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_query(axis: Any, caption: str, rank: int) -> None:
    axis.text(0.97, 0.58, _wrapped(caption), ha="right", va="center", fontsize=8.5)
    axis.text(0.97, 0.02, f"right image at rank {rank:,}", ha="right", va="bottom", fontsize=7, color=_RIGHT if rank == 1 else _FAINT)
    axis.axis("off")


def _draw_candidate(axis: Any, record: Record, dataset: ShardDataset, similarity: float, right: bool) -> None:
    image = dataset[record["position"]].image
    if image is not None:
        axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(f"{similarity:.2f}", fontsize=7, color=_RIGHT if right else _FAINT, labelpad=2)
    for side in axis.spines.values():
        side.set_color(_RIGHT if right else _OTHER)
        side.set_linewidth(3 if right else 0.8)


def _wrapped(text: str, width: int = 30, lines: int = 4) -> str:
    found = textwrap.wrap(text, width) or [""]
    return "\n".join([*found[: lines - 1], found[lines - 1] + ("..." if len(found) > lines else "")] if len(found) >= lines else found)
