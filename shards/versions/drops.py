"""Tables of what a version leaves out, written row group by row group: they may be longer than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.commit import commit_file, temporary

_ROWS = 1 << 17


class TableWriter:
    """Gathers rows into row groups."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer = writer
        self._schema = schema
        self._rows: list[Mapping[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows."""
        self._rows.extend(rows)
        if len(self._rows) >= _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered as a row group."""
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


@contextmanager
def parquet_table(path: Path, schema: pa.Schema) -> Iterator[TableWriter]:
    """Open a table for writing; it has its name once it is whole."""
    with pq.ParquetWriter(temporary(path), schema, compression="zstd") as writer:
        table = TableWriter(writer, schema)
        yield table
        table.flush()
    commit_file(temporary(path), path)
