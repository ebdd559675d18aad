"""Pictures of results, for people."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dataset import ShardDataset
from mmscale.tasks import Record

_RIGHT, _WRONG, _OTHER, _FAINT = "#1a9850", "#d73027", "#d0d0d0", "#707070"


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
    axis.text(0.97, 0.58, _plain(_wrapped(caption)), ha="right", va="center", fontsize=8.5)
    axis.text(0.97, 0.02, f"right image at rank {rank:,}", ha="right", va="bottom", fontsize=7, color=_RIGHT if rank == 1 else _FAINT)
    axis.axis("off")


def _draw_candidate(axis: Any, record: Record, dataset: ShardDataset, similarity: float, right: bool) -> None:
    _draw_image(axis, dataset[record["position"]].image, _RIGHT if right else _OTHER, 3 if right else 0.8)
    axis.set_xlabel(f"{similarity:.2f}", fontsize=7, color=_RIGHT if right else _FAINT, labelpad=2)


def _draw_image(axis: Any, image: Any, colour: str, width: float) -> None:
    if image is not None:
        axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color(colour)
        side.set_linewidth(width)


def draw_confusion(records: Sequence[Record], path: Path, *, most: int = 40) -> None:
    """Draw which label (row) is taken for which (column), as shares of the row; the most frequent labels, all others as one.

    Args:
        records: what the task predicted, with `label` and `prediction`.
        path: the PNG to write.
        most: labels that have a row of their own.
    """
    from matplotlib.figure import Figure

    names, counts_LL = confusion(records, most)
    total_L1 = counts_LL.sum(1, keepdims=True)
    share_LL = np.divide(counts_LL, total_L1, out=np.zeros(counts_LL.shape), where=total_L1 > 0)
    side, short = len(names), [_plain(textwrap.shorten(name, 24, placeholder="...")) for name in names]
    figure = Figure(figsize=(2.2 + 0.26 * side, 2.2 + 0.26 * side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(share_LL, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(side), short, rotation=90, fontsize=7)
    axis.set_yticks(range(side), [f"{name} ({int(n):,})" for name, n in zip(short, total_L1[:, 0], strict=True)], fontsize=7)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("label (samples)", fontsize=9)
    for row, column in np.argwhere(share_LL >= 0.005):
        share = share_LL[row, column]
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color="white" if share > 0.6 else "black")
    figure.suptitle(f"Percent of a label's samples, {len(records):,} in all", fontsize=10)
    figure.savefig(path, dpi=120)


def confusion(records: Sequence[Record], most: int) -> tuple[list[str], NDArray[np.int64]]:
    """Count label against prediction.

    Returns:
        Names, the most frequent labels and predictions first, then `others` where there are more; counts (L, L), a label a row.
    """
    pairs = Counter((str(r["label"]), str(r["prediction"])) for r in records)
    seen: Counter[str] = Counter()
    for (label, prediction), count in pairs.items():
        seen[label] += count
        seen[prediction] += 0  # a name that is only predicted comes last
    ranked = sorted(seen, key=lambda name: (-seen[name], name))
    names = ranked if len(ranked) <= most else [*ranked[:most], f"{len(ranked) - most:,} others"]
    place = {name: min(i, len(names) - 1) for i, name in enumerate(ranked)}
    counts_LL = np.zeros((len(names), len(names)), dtype=np.int64)
    for (label, prediction), count in pairs.items():
        counts_LL[place[label], place[prediction]] += count
    return names, counts_LL


def draw_examples(
    records: Sequence[Record], dataset: ShardDataset, path: Path, *, text: str | None, columns: int = 6, rows: int = 2
) -> None:
    """Draw right predictions above wrong ones: image, question or text, label, prediction, confidence.

    Args:
        records: what the task predicted, with `label`, `prediction` and `confidence`.
        dataset: the data set that the records' positions refer to.
        path: the PNG to write.
        text: field of the text that the model read; None for none.
        columns: examples a row, spread evenly over the records.
        rows: rows of right ones, and of wrong ones.
    """
    from matplotlib.figure import Figure

    both = chosen_examples(records, columns, rows)
    heights = [-(-len(chosen) // columns) for chosen in both]
    figure = Figure(figsize=(2.1 * columns, 0.5 + 2.75 * sum(heights)), layout="constrained")
    grid = figure.subplots(sum(heights), columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for chosen, axes, colour in zip(both, (grid[: heights[0]], grid[heights[0] :]), (_RIGHT, _WRONG), strict=True):
        for axis, record in zip(axes.flat, chosen, strict=False):
            _draw_example(axis, record, dataset, text, colour)
    right = sum(r["label"] == r["prediction"] for r in records)
    figure.suptitle(f"{right:,} right (above, green), {len(records) - right:,} wrong (below, red)", fontsize=10)
    figure.savefig(path, dpi=120)


def chosen_examples(records: Sequence[Record], columns: int, rows: int) -> tuple[list[Record], list[Record]]:
    """Right records and wrong ones, at most `rows` rows of `columns` of each, spread evenly over all."""
    both = [[r for r in records if (r["label"] == r["prediction"]) == right] for right in (True, False)]
    shown = [np.linspace(0, len(found) - 1, min(len(found), rows * columns)).astype(int) for found in both]
    right, wrong = ([found[i] for i in indices] for found, indices in zip(both, shown, strict=True))
    return right, wrong


def draw_scatter(target_N: NDArray[np.float64], prediction_N: NDArray[np.float64], path: Path, *, name: str) -> None:
    """Draw predicted numbers over true ones, with the line where both are equal. What is not finite is left out, and counted.

    Args:
        target_N: true numbers.
        prediction_N: predicted ones.
        path: the PNG to write.
        name: of the field.
    """
    from matplotlib.figure import Figure

    shown_N = np.isfinite(target_N) & np.isfinite(prediction_N)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    axis.scatter(target_N[shown_N], prediction_N[shown_N], s=12, alpha=max(0.05, min(0.6, 200 / max(1, shown_N.sum()))), color="#4575b4")
    if shown_N.any():
        axis.axline((0, 0), slope=1, color=_FAINT, linewidth=0.8)
        ends = [function([target_N[shown_N], prediction_N[shown_N]]) for function in (np.min, np.max)]
        spare = 0.05 * (ends[1] - ends[0]) or 1.0
        axis.set(xlim=(ends[0] - spare, ends[1] + spare), ylim=(ends[0] - spare, ends[1] + spare), aspect="equal")
    left_out = len(target_N) - shown_N.sum()
    axis.set_title(f"{shown_N.sum():,} samples" + (f", {left_out:,} not finite and not shown" if left_out else ""), fontsize=10)
    axis.set_xlabel(_plain(name))
    axis.set_ylabel("predicted")
    figure.savefig(path, dpi=120)


def draw_anomalies(records: Sequence[Record], dataset: ShardDataset, path: Path, *, columns: int = 8) -> None:
    """Draw how scores are spread, above the samples that score most and least.

    Args:
        records: with `score`, and `anomaly`: true, false or None.
        dataset: the data set that the records' positions refer to.
        path: the PNG to write.
        columns: samples a row.
    """
    from matplotlib.figure import Figure

    ranked = sorted((r for r in records if np.isfinite(r["score"])), key=lambda r: -r["score"])
    figure = Figure(figsize=(1.4 * columns, 6.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.25])
    upper, lower = halves
    axis = upper.subplots()
    kinds = {"normal": (False, _RIGHT), "anomaly": (True, _WRONG), "not known": (None, _OTHER)}
    scores = {name: [r["score"] for r in ranked if r["anomaly"] is kind] for name, (kind, _) in kinds.items()}
    bins = _edges([r["score"] for r in ranked])
    for name, (_, colour) in kinds.items():
        if scores[name]:
            axis.hist(scores[name], bins, color=colour, alpha=0.6, label=f"{name} ({len(scores[name]):,})")
    if ranked:
        axis.legend(fontsize=8)
    axis.set(xlabel="score: mean error of hidden patches", ylabel="samples")
    grid = lower.subplots(2, columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for chosen, axes in ((ranked[:columns], grid[0]), (ranked[: -columns - 1 : -1], grid[1])):
        for record, axis in zip(chosen, axes, strict=False):
            axis.axis("on")
            colour = {True: _WRONG, False: _RIGHT, None: _OTHER}[record["anomaly"]]
            _draw_scored(axis, record, dataset[record["position"]].image, colour)
            axis.set_title(textwrap.shorten(_plain(str(record["key"])), 18, placeholder="..."), fontsize=6)
            axis.set_xlabel(f"{record['score']:.3g}", fontsize=7.5, color=_FAINT, labelpad=3)
    lower.suptitle("The highest scores (above) and the lowest ones (below); green: normal, red: anomaly", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_scored(axis: Any, record: Record, image: Any, colour: str) -> None:
    """An image, else the scores along time."""
    curves = record.get("by_time", {}) if image is None else {}
    for name, means in curves.items():
        axis.plot(np.linspace(0, 1, len(means)), means, linewidth=0.9, label=name)
    _draw_image(axis, image, colour, 2.5)
    if curves:
        axis.set_ylim(0, None)
        axis.legend(fontsize=5, loc="upper right")
    elif image is None:
        axis.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=7, color=_FAINT, transform=axis.transAxes)


def draw_attention(
    records: Sequence[Record],
    maps: Mapping[int, NDArray[np.float32]],
    dataset: ShardDataset,
    path: Path,
    *,
    text: str | None,
    columns: int = 3,
) -> None:
    """Draw images beside themselves under the attention that the answer's token pays to their patches.

    Args:
        records: what the task predicted, with `label`, `prediction` and `confidence`; all have an image.
        maps: attention to the patches of the record at each position, (height, width).
        dataset: the data set that the records' positions refer to.
        path: the PNG to write.
        text: field of the text that the model read; None for none.
        columns: records a row.
    """
    from matplotlib.figure import Figure

    rows = -(-len(records) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.6 + 2.75 * rows), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for record, (left, right) in zip(records, grid.reshape(-1, 2), strict=False):
        colour = _RIGHT if record["label"] == record["prediction"] else _WRONG
        _draw_example(left, record, dataset, text, colour)
        _draw_map(right, dataset[record["position"]].image, maps[record["position"]], colour)
    figure.suptitle(
        "Attention of the token that answers to the image, mean over heads and fusion layers; dark: none, bright: the most of any patch "
        "of this image.\nBelow, the part that goes to the image at all, and the most that one patch gets; it shows where, not why.",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def _draw_map(axis: Any, image: Any, map_HW: NDArray[np.float32], colour: str) -> None:
    axis.axis("on")
    _draw_image(axis, np.asarray(image).mean(-1), colour, 2.5)
    axis.images[0].set_cmap("gray")
    height, width = np.asarray(image).shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(map_HW, cmap="inferno", alpha=0.65, vmin=0, extent=extent, interpolation="nearest")
    axis.set_xlabel(f"{map_HW.sum():.0%} to the image, most {map_HW.max():.1%}", fontsize=7.5, color=_FAINT, labelpad=3)


def _draw_example(axis: Any, record: Record, dataset: ShardDataset, text: str | None, colour: str) -> None:
    example = dataset[record["position"]]
    axis.axis("on")
    _draw_image(axis, example.image, colour, 2.5)
    if example.image is None:
        axis.set_aspect("equal")
        axis.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=7, color=_FAINT, transform=axis.transAxes)
    words = example.texts(text)[:1] if text is not None else []
    if words:
        axis.set_title(_plain(_wrapped(words[0], 28, 3)), fontsize=7)
    label, prediction = (textwrap.shorten(str(record[key]), 26, placeholder="...") for key in ("label", "prediction"))
    said = f"{prediction} ({record['confidence']:.0%})" + ("" if record["label"] == record["prediction"] else f"\nlabel: {label}")
    axis.set_xlabel(_plain(said), fontsize=7.5, color=colour, labelpad=3)


def _edges(scores: list[float], bins: int = 40) -> NDArray[np.float64]:
    """Edges of a histogram's bins, also of scores that nothing but rounding tells apart."""
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    margin = max(0.0, 1e-6 * max(abs(low), abs(high), 1e-30) - (high - low))
    return np.linspace(low - margin, high + margin or 1.0, bins + 1)


def _plain(text: str) -> str:
    """A dollar sign of a text is not the begin of a formula."""
    return text.replace("$", r"\$")


def _wrapped(text: str, width: int = 30, lines: int = 4) -> str:
    found = textwrap.wrap(text, width) or [""]
    return "\n".join([*found[: lines - 1], found[lines - 1] + ("..." if len(found) > lines else "")] if len(found) >= lines else found)
