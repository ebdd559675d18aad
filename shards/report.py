"""What a data set looks like: statistics from the sidecars, a contact sheet with histograms, and any single sample."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from shards.commit import commit_bytes
from shards.errors import DataError, SampleError
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.sample import Sample
from shards.store.place import is_url, normal, shown

Values = npt.NDArray[np.int64]

_WHOLE = ("width", "height", "sample_rate", "frames", "caption_length")
COLUMNS = 10
"""Pictures in a row of the contact sheet."""
THUMBNAIL = 192
"""Side in pixels of the square a picture is fitted into."""

_INK, _MUTED, _PAPER, _LINE = "#1f2937", "#6b7280", "#f3f4f6", "#e5e7eb"
_BLUE, _ORANGE = "#3b6fb6", "#e08a3c"
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Numbers of a data set, all from its sidecars: no tar is read."""

    root: str
    """Folder or URL."""
    digest: str
    """The data set's version."""
    rows: int
    """Samples."""
    bytes: int
    """Of all tars."""
    shard_rows: Values
    """Samples of each shard."""
    widths: Values
    heights: Values
    """Pixels, of the samples with an image."""
    durations: npt.NDArray[np.float64]
    """Seconds, of the samples with audio or video."""
    sample_rates: Values
    """Hz, of the samples with audio."""
    frames: Values
    """Pictures, of the samples with a video."""
    caption_lengths: Values
    """Characters, of the samples with a caption."""
    sample_bytes: Values
    """Bytes of all parts of each sample."""
    part_counts: Counter[str] = field(default_factory=Counter)
    """Parts by extension."""
    part_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes by extension."""


def statistics(folder: str | Path) -> Statistics:
    """Gather the numbers of a data set.

    Raises:
        ShardError: there is no finished data set.
    """
    reader = ShardReader(folder)
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*_WHOLE, "duration_s", "sample_bytes")}
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for shard in range(len(reader.rows_per_shard)):
        table = reader.index(shard)
        for name in (*_WHOLE, "duration_s"):
            columns[name].append(pc.drop_null(table[name]).to_numpy().astype(np.int64 if name in _WHOLE else np.float64))
        flat = pc.list_flatten(table["parts"])
        part_sizes = pc.struct_field(flat, "size").to_numpy()
        columns["sample_bytes"].append(_sum_by_row(part_sizes, pc.list_value_length(table["parts"]).to_numpy()))
        for ext, codes in _by_extension(pc.struct_field(flat, "ext")):
            counts[ext] += int(codes.sum())
            sizes[ext] += int(part_sizes[codes].sum())
    joined = {name: np.concatenate(arrays) if arrays else np.empty(0, np.int64) for name, arrays in columns.items()}
    return Statistics(
        root=reader.store.root,
        digest=reader.manifest.digest,
        rows=len(reader),
        bytes=reader.manifest.bytes,
        shard_rows=np.asarray(reader.rows_per_shard, dtype=np.int64),
        widths=joined["width"],
        heights=joined["height"],
        durations=joined["duration_s"].astype(np.float64),
        sample_rates=joined["sample_rate"],
        frames=joined["frames"],
        caption_lengths=joined["caption_length"],
        sample_bytes=joined["sample_bytes"],
        part_counts=counts,
        part_bytes=sizes,
    )


def data_set_name(root: str | Path) -> str:
    """Return the last part of a data set's folder or URL."""
    return shown(normal(root)).rpartition("/")[2] if is_url(root) else Path(root).resolve().name


def summary(folder: str | Path) -> str:
    """Say in a few lines what a data set holds."""
    found = statistics(folder)
    lines = [
        f"{found.root}: {found.rows:,} samples in {_shards(found)}, {_bytes(found.bytes)}, version {found.digest[:16]}",
        f"  shards    {_range(found.shard_rows)} samples",
        f"  images    {len(found.widths):,} of {found.rows:,}   width {_range(found.widths)}   height {_range(found.heights)} pixels",
        f"  captions  {len(found.caption_lengths):,} of {found.rows:,}   {_range(found.caption_lengths)} characters",
    ]
    if len(found.durations):
        lines.append(f"  length    {len(found.durations):,} of {found.rows:,}   {_range(found.durations)} seconds, {_hours(found)} in all")
    if len(found.sample_rates):
        lines.append(f"  audio     {len(found.sample_rates):,} of {found.rows:,}   {_range(found.sample_rates)} Hz")
    if len(found.frames):
        lines.append(f"  video     {len(found.frames):,} of {found.rows:,}   {_range(found.frames)} pictures")
    for ext, count in sorted(found.part_counts.items()):
        size = found.part_bytes[ext]
        lines.append(f"  .{ext:<8} {count:,} parts   {_bytes(size)}   {_bytes(size / count)} on average")
    return "\n".join([*lines, "  (least / mean / most)"])


def find(reader: ShardReader, key: str) -> tuple[int, int]:
    """Find a sample by its key.

    Returns:
        (shard, row) of the first one.

    Raises:
        DataError: no sample has that key.
    """
    for shard in range(len(reader.rows_per_shard)):
        row = pc.index(reader.index(shard)["key"], key).as_py()
        if row >= 0:
            return shard, int(row)
    raise DataError(f"No sample of {reader.store.root!r} has the key {key!r}. Keys look like {reader.key(*_first_row(reader))!r}.")


def show_sample(folder: str | Path, key: str, out_png: str | Path | None = None) -> str:
    """Say what one sample holds and, where asked and possible, save its picture as PNG.

    Raises:
        DataError: no sample has that key, or its bytes do not match their checksums.
    """
    reader = ShardReader(folder)
    shard, row = find(reader, key)
    sample = reader[shard, row]
    lines = [f"{reader.manifest.shards[shard].shard}:{key} (shard {shard}, row {row})"]
    for ext, data in sample.parts.items():
        lines.append(f"  .{ext:<8} {_bytes(len(data))}" + (f"   {_excerpt(data)}" if ext in ("txt", "json") else ""))
    image = picture_of(sample)
    if image is not None and out_png is not None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        commit_bytes(Path(out_png), buffer.getvalue())
        lines.append(f"  {image.width} x {image.height} pixels, saved as {out_png}")
    return "\n".join(lines)


def render(folder: str | Path, out_png: str | Path, *, samples: int = 4 * COLUMNS) -> None:
    """Draw a contact sheet of randomly drawn samples with their captions, above histograms of the whole data set.

    The same data set gives the same samples.

    Raises:
        DataError: there is no finished data set, or a sample's bytes do not match their checksums.
    """
    found = statistics(folder)
    shown = _draw(ShardReader(folder), samples)
    sheet_rows = -(-len(shown) // COLUMNS)
    heights_inch = (0.75, 1.72 * sheet_rows, 2.5)
    figure = Figure(figsize=(14, sum(heights_inch)), dpi=120, facecolor="white")
    head, sheet, charts = np.asarray(figure.subfigures(3, 1, height_ratios=heights_inch))
    with matplotlib.rc_context({"text.parse_math": False, "text.color": _INK, "axes.labelcolor": _INK}):
        _draw_head(head, found)
        _draw_sheet(sheet, shown, sheet_rows)
        _draw_charts(charts, found)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    commit_bytes(Path(out_png), buffer.getvalue())


def _draw_head(head: Any, found: Statistics) -> None:
    head.text(0.02, 0.62, data_set_name(found.root), fontsize=17, weight="bold", va="center")
    line = f"{found.rows:,} samples   {_shards(found)}   {_bytes(found.bytes)}   version {found.digest[:16]}"
    head.text(0.02, 0.12, line, fontsize=10.5, color=_MUTED, va="center")


def _draw_sheet(sheet: Any, shown: list[Sample], sheet_rows: int) -> None:
    cells = sheet.subplots(sheet_rows, COLUMNS, squeeze=False)
    sheet.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.0, wspace=0.1, hspace=0.02)
    for cell in cells.flat:
        cell.set_axis_off()
    for cell, sample in zip(cells.flat, shown, strict=False):
        image = picture_of(sample)
        cell.set(xlim=(0, THUMBNAIL), ylim=(THUMBNAIL * 1.36, 0), aspect="equal")
        cell.imshow(thumbnail(image), extent=(0, THUMBNAIL, THUMBNAIL, 0))
        cell.add_patch(Rectangle((0, 0), THUMBNAIL, THUMBNAIL, fill=False, edgecolor=_LINE, linewidth=0.8))
        if image is None:
            note = "does not decode" if sample.image() else "no image"
            cell.text(THUMBNAIL / 2, THUMBNAIL / 2, note, fontsize=8, color=_MUTED, ha="center", va="center")
        cell.text(THUMBNAIL / 2, THUMBNAIL * 1.04, _label(sample), fontsize=6.8, ha="center", va="top", linespacing=1.15)


def _draw_charts(charts: Any, found: Statistics) -> None:
    drawn: list[tuple[str, str, dict[str, npt.NDArray[Any]]]] = [
        ("image side", "pixels", {"width": found.widths, "height": found.heights}),
        ("caption length", "characters", {"caption": found.caption_lengths}),
        ("size of a sample", "kB", {"sample": found.sample_bytes / 1e3}),
        ("samples in a shard", "samples", {"shard": found.shard_rows}),
    ]
    if len(found.durations):
        drawn.insert(1, ("length", "seconds", {"sample": found.durations}))
    axes = charts.subplots(1, len(drawn))
    charts.subplots_adjust(left=0.045, right=0.98, top=0.86, bottom=0.2, wspace=0.22)
    for one, (title, unit, series) in zip(axes, drawn, strict=True):
        _histogram(one, title, unit, series)


def _histogram(axes: Axes, title: str, unit: str, series: dict[str, npt.NDArray[Any]]) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", weight="bold")
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=8, colors=_MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    everything = np.concatenate(list(series.values()))
    if not everything.size:
        axes.text(0.5, 0.5, "none", color=_MUTED, ha="center", va="center", transform=axes.transAxes)
        return
    if np.issubdtype(everything.dtype, np.integer):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    edges = _edges(everything)
    clipped = [np.clip(values, edges[0], edges[-1]) for values in series.values()]
    axes.hist(clipped, bins=edges, color=[_BLUE, _ORANGE][: len(series)], label=list(series), rwidth=0.92)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _edges(values: npt.NDArray[Any]) -> list[float]:
    """Bin from the least value to the 99.5th percentile: a few giants must not squeeze all others into one bar."""
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    if high - low < 1e-9:
        return [low - 1.5, low - 0.5, low + 0.5, low + 1.5]
    if not np.issubdtype(values.dtype, np.integer):
        return list(np.linspace(low, high, 31))
    width = max(1, round((high - low) / 30))  # whole numbers: each bar covers equally many of them
    return list(np.arange(low, high + width + 1, width) - 0.5)


def _draw(reader: ShardReader, samples: int) -> list[Sample]:
    _, shards, rows = GlobalOrder(reader.rows_per_shard, seed=0).locate(np.arange(min(samples, len(reader))))
    return [reader[place] for place in sorted(zip(shards.tolist(), rows.tolist(), strict=True))]


def picture_of(sample: Sample) -> Image.Image | None:
    """Decode a sample's picture, upright and over white; None without one that decodes."""
    image = sample.image()
    if image is None:
        return None
    try:
        with Image.open(io.BytesIO(image[1])) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    except _DECODE_ERRORS:
        return None


def thumbnail(image: Image.Image | None, side: int = THUMBNAIL) -> Image.Image:
    """Fit a picture into a square of so many pixels; a plain one stands for none."""
    paper = Image.new("RGB", (side, side), _PAPER)
    if image is not None:
        # Small pictures are enlarged by whole pixels: a smooth one would hide what the model sees.
        way = Image.Resampling.NEAREST if max(image.size) <= side // 2 else Image.Resampling.LANCZOS
        fitted = ImageOps.contain(image, (side, side), way)
        paper.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return paper


def _label(sample: Sample) -> str:
    try:
        captions = sample.captions()
    except SampleError as e:
        captions = [f"({e.reason})"]
    text = " ".join(captions[0].split()) if captions else sample.key
    known = get_font(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf").get_charmap()
    drawable = "".join(char if ord(char) in known else "\u25a1" for char in text[:200])
    fitting = 19 if drawable.isupper() else 24  # capitals are wider
    return "\n".join(textwrap.wrap(drawable, fitting, max_lines=3, placeholder=" \u2026"))


def _by_extension(extensions: Any) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    return [(ext.as_py(), pc.equal(extensions, ext).to_numpy(zero_copy_only=False)) for ext in pc.unique(extensions)]


def _sum_by_row(values: Values, lengths: npt.NDArray[np.integer[Any]]) -> Values:
    ends = np.cumsum(lengths)
    totals = np.concatenate([[0], np.cumsum(values)])
    sums: Values = (totals[ends] - totals[ends - lengths]).astype(np.int64)
    return sums


def _first_row(reader: ShardReader) -> tuple[int, int]:
    return next((shard, 0) for shard, rows in enumerate(reader.rows_per_shard) if rows)


def _shards(found: Statistics) -> str:
    count = len(found.shard_rows)
    return f"{count:,} shard{'' if count == 1 else 's'}"


def _range(values: npt.NDArray[Any]) -> str:
    if not len(values):
        return "none"
    places = "" if np.issubdtype(values.dtype, np.integer) else ".1f"
    return f"{values.min():,{places}} / {values.mean():,.1f} / {values.max():,{places}}"


def _hours(found: Statistics) -> str:
    seconds = float(found.durations.sum())
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _excerpt(data: bytes) -> str:
    return textwrap.shorten(data.decode("utf-8", errors="replace"), 160, placeholder=" ...")
