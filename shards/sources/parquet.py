"""Rows of parquet files as records that are looked up when they are needed: what is held of a row is four bytes, if that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import SourceError
from shards.sources.keys import Hashes, Repeats, hash_keys, keys_of_cells, keys_of_paths, numbered_keys
from shards.sources.record import LazyRecords, Record, safe_key

_BATCH_ROWS = 65536


@dataclass(frozen=True, slots=True)
class _Group:
    """One row group."""

    file: int
    group: int
    rows: int
    size: int
    """Bytes, uncompressed."""
    first: int
    """Number of its first row among all."""
    first_in_file: int


class ParquetRows(LazyRecords):
    """All rows of some parquet files.

    Keys come from the column `key`, or else from the paths in the column `image` if it holds any, or else from the row numbers.

    Args:
        files: the tables.
        key: column of keys, or None.
        image: column of image paths, bytes or {bytes, path} structs, or None.

    Raises:
        SourceError: a file cannot be read.
    """

    def __init__(self, files: Sequence[Path], *, key: str | None, image: str | None) -> None:
        self._files = files
        self._key = key
        self._image = image
        self._digest = hashlib.sha256()
        self._groups: list[_Group] = []
        self._columns: list[str | None] = []
        for number, file in enumerate(files):
            with opened(file) as parquet:
                self._add_groups(number, file, parquet)
        self._count = self._groups[-1].first + self._groups[-1].rows if self._groups else 0
        self._starts = np.asarray([group.first for group in self._groups], dtype=np.int64)
        stems = {file.stem for file in files}
        self._prefixes = [file.stem if len(stems) == len(files) else f"{n:05d}-{file.stem}" for n, file in enumerate(files)]
        self._held: tuple[int, list[str | None]] | None = None
        self._repeats = self._find_repeats()

    def __len__(self) -> int:
        """Rows of all files."""
        return self._count

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        """Look up the record of a row, or of a range of them."""
        if isinstance(place, slice):
            start, stop, step = place.indices(self._count)
            return list(self._between(start, stop))[::step]
        if not -self._count <= place < self._count:
            raise IndexError(f"There is no row {place}: the tables have {self._count}.")
        return next(self._between(place % self._count, place % self._count + 1))

    def __iter__(self) -> Iterator[Record]:
        """Go through all rows."""
        return self._between(0, self._count)

    def digest(self) -> str:
        """Digest of the files' names, row groups and their sizes, and of all keys."""
        return self._digest.hexdigest()

    def _add_groups(self, number: int, file: Path, parquet: pq.ParquetFile) -> None:
        self._columns.append(self._key or self._path_column(parquet.schema_arrow))
        self._digest.update(f"{file.name}\t{file.stat().st_size}\t{self._columns[-1]}\n".encode("utf-8", "surrogateescape"))
        first_in_file = 0
        for index in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(index)
            first = self._groups[-1].first + self._groups[-1].rows if self._groups else 0
            self._groups.append(_Group(number, index, group.num_rows, group.total_byte_size, first, first_in_file))
            self._digest.update(f"{group.num_rows}\t{group.total_byte_size}\n".encode())
            first_in_file += group.num_rows

    def _path_column(self, schema: pa.Schema) -> str | None:
        """The column whose image paths name the samples: not one of image bytes, which are read only when they are written."""
        if self._image is None:
            return None
        kind = schema.field(self._image).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return self._image
        is_named = pa.types.is_struct(kind) and any(kind.field(i).name == "path" for i in range(kind.num_fields))
        return f"{self._image}.path" if is_named else None

    def _find_repeats(self) -> Repeats | None:
        if not any(self._columns):
            return None
        hashes: list[Hashes] = []
        bases: list[Hashes] = []
        numbers: list[Any] = []
        for keys in self._all_keys():
            hashes.append(hash_keys(keys))
            self._digest.update(hashes[-1].tobytes())
            if self._key is None:
                base, number = numbered_keys(keys)
                bases.append(base)
                numbers.append(number)
        hashes_n = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        hashes.clear()
        numbered = (np.concatenate(bases), np.concatenate(numbers)) if bases else None
        return Repeats(hashes_n, numbered)

    def _all_keys(self) -> Iterator[pa.Array]:
        """Keys of all rows, batch by batch; rows without one get a name of their own."""
        for file_number, file in enumerate(self._files):
            row = 0
            with opened(file) as parquet:
                column = self._columns[file_number]
                for batch in parquet.iter_batches(_BATCH_ROWS, columns=[column] if column else []):
                    names = _Names(self._prefixes[file_number], row)
                    row += batch.num_rows
                    yield self._keys(_only_column(batch, column), names) if column else pa.array(list(names[: batch.num_rows]), pa.string())

    def _keys(self, cells: pa.Array, names: _Names) -> pa.Array:
        if self._key is None:
            return keys_of_paths(cells.cast(pa.string()), names)
        keys = keys_of_cells(cells)
        if not keys.null_count:
            return keys
        return pa.array([names.key(i) if key is None else key for i, key in enumerate(keys.to_pylist())], pa.string())

    def _between(self, start: int, stop: int) -> Iterator[Record]:
        while start < stop:
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            while self._groups[index].rows == 0:
                index -= 1
            group = self._groups[index]
            keys = self._group_keys(index)
            end = min(stop, group.first + group.rows)
            for row in range(start - group.first, end - group.first):
                yield self._record(group, row, keys[row] if keys else None)
            start = end

    def _group_keys(self, index: int) -> list[str | None] | None:
        """Keys of one row group, null where its key column is empty; the last group's are held."""
        group = self._groups[index]
        column = self._columns[group.file]
        if column is None:
            return None
        if self._held is None or self._held[0] != index:
            self._held = None
            with opened(self._files[group.file]) as parquet:
                cells = _only_column(parquet.read_row_group(group.group, columns=[column]).combine_chunks(), column)
            names = _Names(self._prefixes[group.file], group.first_in_file)
            keys = keys_of_cells(cells) if self._key is not None else keys_of_paths(cells.cast(pa.string()), names)
            self._held = index, keys.to_pylist()
        return self._held[1]

    def _record(self, group: _Group, row: int, key: str | None) -> Record:
        in_file, number = group.first_in_file + row, group.first + row
        where = f"{self._files[group.file].name}:{in_file}"
        name = _Names(self._prefixes[group.file], 0).key(in_file)
        locator = (group.file, group.group, row)
        if key is None and self._key is not None:
            return Record(name, where, None, ("bad_key", f"Column {self._key!r} is empty."))
        if key is None or self._repeats is None:
            return Record(name, where, locator)
        if self._key is None:
            return Record(self._repeats.number(number, key), where, locator)
        return Record(key, where, locator, self._shared(number, key) if self._repeats.rank(number) else None)

    def _shared(self, number: int, key: str) -> tuple[str, str]:
        rows = self._repeats.sharing(number) if self._repeats is not None else np.empty(0, np.int64)
        names = ", ".join(self._where(int(row)) for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        return "duplicate_key", f"{len(rows)} inputs have the key {key!r}: {names}."

    def _where(self, number: int) -> str:
        group = self._groups[int(np.searchsorted(self._starts, number, side="right")) - 1]
        return f"{self._files[group.file].name}:{group.first_in_file + number - group.first}"


class _Names(Sequence[str]):
    """Names of the rows of a file by their numbers, made when they are asked for."""

    def __init__(self, prefix: str, first: int) -> None:
        self._prefix = prefix
        self._first = first

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self.key(i) for i in range(place.start or 0, place.stop)]
        return self.key(place)

    def key(self, row: int) -> str:
        return safe_key(f"{self._prefix}-{self._first + row:09d}")


def opened(file: Path) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        SourceError: it is none.
    """
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as e:
        raise SourceError(f"The table {str(file)!r} cannot be read as parquet: {e}. Write it again.") from e


def _only_column(table: Any, column: str) -> pa.Array:
    """The one column that was read, out of its struct where `column` names a field of one."""
    found = table.column(0)
    if isinstance(found, pa.ChunkedArray):
        found = found.combine_chunks() if found.num_chunks != 1 else found.chunk(0)
    if pa.types.is_struct(found.type) and "." in column:
        found = pc.struct_field(found, column.rpartition(".")[2])
    return found
