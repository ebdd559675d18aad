"""A table of pairs: csv, tsv, jsonl (image paths) or parquet (image paths or bytes), with any names of columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.config import WriteConfig
from shards.errors import ConfigError, SampleError, SourceError
from shards.sources.keys import key_of_path
from shards.sources.parquet import ParquetRows, opened
from shards.sources.paths import expand
from shards.sources.record import RawSample, Record, read_file, refuse_shared_keys, safe_key
from shards.sources.rows import read_rows

TEXT_EXTENSIONS = (".csv", ".tsv", ".jsonl")
EXTENSIONS = (*TEXT_EXTENSIONS, ".parquet")


class TableSource:
    """Rows of one table, or of several with the same columns."""

    def __init__(self, config: WriteConfig) -> None:
        self._config = config
        self._columns = config.columns
        self._files = expand(config.path or "", EXTENSIONS)
        for file in self._files:
            if file.suffix.lower() not in EXTENSIONS:
                raise SourceError(f"{str(file)!r} is not a table that can be read. Give a file that ends in {', '.join(EXTENSIONS)}.")
        self._open: tuple[tuple[int, int], pa.Table] | None = None
        # The column whose paths name the samples.
        self._named_by = self._columns.image or self._columns.audio or self._columns.video

    def records(self) -> Sequence[Record]:
        """List the rows of every file in order; those of parquet are looked up when they are needed."""
        parquet = [file for file in self._files if file.suffix.lower() == ".parquet"]
        if parquet and len(parquet) < len(self._files):
            raise SourceError(f"`path` {self._config.path!r} names parquet and text tables together. Give one kind at a time.")
        if parquet:
            return self._parquet_rows()
        listed = [record for number, file in enumerate(self._files) for record in self._text_records(number, file)]
        if not listed:
            raise SourceError(f"The table {self._config.path!r} has no rows. Give another `path`.")
        if self._columns.key is not None:
            return refuse_shared_keys(listed)
        return _number_repeated_keys(listed)

    def _parquet_rows(self) -> ParquetRows:
        for file in self._files:
            with opened(file) as parquet:
                self._check_columns(file, parquet.schema_arrow.names)
        rows = ParquetRows(self._files, key=self._columns.key, image=self._named_by)
        if not rows:
            raise SourceError(f"The table {self._config.path!r} has no rows. Give another `path`.")
        return rows

    def load(self, record: Record) -> RawSample:
        """Turn one row into a raw sample, its image read."""
        cells = self._cells(record)
        columns = self._columns
        image, audio, video = (
            self._media(record, cells.get(column), kind, config.max_bytes) if column else None
            for kind, column, config in (
                ("image", columns.image, self._config.image),
                ("audio", columns.audio, self._config.audio),
                ("video", columns.video, self._config.video),
            )
        )
        captions = self._captions(record.key, cells.get(columns.caption) if columns.caption else None)
        return RawSample(image=image, audio=audio, video=video, captions=captions, fields=self._fields(cells))

    def _text_records(self, number: int, file: Path) -> Iterator[Record]:
        named: dict[str, None] = {}
        for place, row in enumerate(read_rows(file, self._config.table)):
            where = f"{file.name}:{row.line}"
            if row.problem is not None:
                yield Record(safe_key(f"{file.stem}-{place:09d}"), where, None, row.problem)
                continue
            named.update(dict.fromkeys(row.cells))
            yield self._record(file, place, where, row.cells, (number, row.cells))
        if named:
            self._check_columns(file, list(named))

    def _record(self, file: Path, place: int, where: str, cells: Mapping[str, Any], locator: Any) -> Record:
        if self._columns.key is not None:
            value = cells.get(self._columns.key)
            if value is None or value == "":
                return Record(safe_key(f"{file.stem}-{place:09d}"), where, None, ("bad_key", f"Column {self._columns.key!r} is empty."))
            return Record(safe_key(str(value)), where, locator)
        path = _path_in(cells.get(self._named_by)) if self._named_by else None
        return Record(key_of_path(path, f"{file.stem}-{place:09d}"), where, locator)

    def _cells(self, record: Record) -> Mapping[str, Any]:
        if not isinstance(record.locator[1], int):
            cells: Mapping[str, Any] = record.locator[1]
            return cells
        file_number, group, row = record.locator[:3]
        if self._open is None or self._open[0] != (file_number, group):
            self._open = None  # two row groups need not be in memory at once
            with opened(self._files[file_number]) as parquet:
                self._open = (file_number, group), parquet.read_row_group(group)
        cells = self._open[1].slice(row, 1).to_pylist()[0]
        return cells

    def _media(self, record: Record, cell: Any, kind: str, max_bytes: int) -> bytes | None:
        key = record.key
        if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
            cell = cell["bytes"]
        if isinstance(cell, bytes):
            return cell
        path = _path_in(cell)
        if not path:
            if cell is None or path == "":
                return None
            raise SampleError(key, "bad_row", f"The {kind} cell must be a path or bytes; got a {type(cell).__name__}.")
        root = self._config.table.image_root
        folder = Path(root) if root is not None else self._files[record.locator[0]].parent
        try:
            return read_file(key, folder / path, max_bytes)
        except SampleError as e:
            if e.reason != "missing_file" or root is not None or Path(path).is_absolute():
                raise
            hint = "Paths start from the table's folder; table.image_root names another."
            raise SampleError(key, e.reason, f"{e.detail} {hint}") from e

    def _captions(self, key: str, cell: Any) -> list[str]:
        if cell is None:
            return []
        cells = cell if isinstance(cell, list) else [cell]
        if not all(isinstance(text, (str, int, float)) for text in cells):
            raise SampleError(key, "bad_caption", f"The caption cell must hold a text or a list of texts; got {cell!r:.80}.")
        separator = self._columns.caption_separator
        texts = [str(text) for text in cells]
        return texts if separator is None else [part for text in texts for part in text.split(separator)]

    def _fields(self, cells: Mapping[str, Any]) -> dict[str, Any]:
        columns = self._columns
        if columns.fields is not None:
            kept = {name: cells[name] for name in columns.fields if name in cells}
        else:
            taken = {columns.image, columns.audio, columns.video, columns.caption, columns.key}
            kept = {name: value for name, value in cells.items() if name not in taken and not isinstance(value, bytes)}
        for name in columns.lists:
            if isinstance(value := kept.get(name), str):
                kept[name] = [entry.strip() for entry in value.split(columns.list_separator) if entry.strip()]
        return kept

    def _check_columns(self, file: Path, present: list[str]) -> None:
        columns = self._columns
        asked = [(name, getattr(columns, name)) for name in ("image", "audio", "video", "caption", "key")]
        asked += [("fields", name) for name in columns.fields or []] + [("lists", name) for name in columns.lists]
        for name, column in asked:
            if column is not None and column not in present:
                raise ConfigError(
                    f"`columns.{name}`: the table {file.name!r} has no column {column!r}; it has {', '.join(present)}. "
                    f"Set columns.{name} to one of them{', or to null' if name not in ('fields', 'lists') else ''}."
                )


def _path_in(cell: Any) -> str | None:
    if isinstance(cell, Mapping):
        cell = cell.get("path")
    return cell.strip() if isinstance(cell, str) else None


def _number_repeated_keys(records: list[Record]) -> list[Record]:
    """Give the second and later rows of one image keys of their own: `cat`, `cat-2`, `cat-3`."""
    taken = {record.key for record in records}
    seen: Counter[str] = Counter()
    numbered = []
    for record in records:
        seen[record.key] += 1
        key = record.key
        if seen[key] > 1:
            key = safe_key(f"{record.key}-{seen[record.key]}")
            while key in taken:
                seen[record.key] += 1
                key = safe_key(f"{record.key}-{seen[record.key]}")
            taken.add(key)
        numbered.append(replace(record, key=key))
    return numbered
