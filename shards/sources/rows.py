"""Rows of csv, tsv and jsonl tables as mappings; text that is not UTF-8 comes as lone surrogates, to be judged row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.config import TableConfig
from shards.errors import SourceError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a text table."""

    line: int
    """Number of its (last) line in the file, from 1."""
    cells: dict[str, Any]
    """Values by column; strings in csv and tsv, anything in jsonl."""
    problem: tuple[str, str] | None = None
    """(reason, detail) of a row that cannot be parsed."""


def read_rows(file: Path, config: TableConfig) -> Iterator[Row]:
    """Read a csv, tsv or jsonl file row by row.

    Raises:
        SourceError: the file cannot be read or has no header.
    """
    try:
        data = file.read_bytes()
    except OSError as e:
        raise SourceError(f"The table {str(file)!r} cannot be read: {e.strerror}.") from e
    text = data.decode("utf-8-sig", "surrogateescape")
    if file.suffix.lower() == ".jsonl":
        return _json_lines(text)
    return _separated(file, text, config)


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as e:
            yield Row(number, {}, ("bad_row", f"Line {number} is not JSON: {e}."))
            continue
        if isinstance(cells, dict):
            yield Row(number, cells)
        else:
            yield Row(number, {}, ("bad_row", f"Line {number} must hold a mapping, not a {type(cells).__name__}."))


def _separated(file: Path, text: str, config: TableConfig) -> Iterator[Row]:
    tabs = file.suffix.lower() == ".tsv"
    quoted = config.quoted if config.quoted is not None else not tabs
    stream = io.StringIO(text, newline="")
    # csv's limit on the size of a field is a global of the module; captions of any size must come this far to be judged.
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        reader = csv.reader(stream, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as e:
        raise SourceError(
            f"The table {str(file)!r} cannot be parsed at line {reader.line_num}: {e}. Set table.quoted=false if its quotes mean nothing."
        ) from e
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise SourceError(f"The table {str(file)!r} is empty. Its first line must name the columns.")
    return _named(rows)


def _named(rows: list[tuple[int, list[str]]]) -> Iterator[Row]:
    header = rows[0][1]
    for line, row in rows[1:]:
        if len(row) == len(header):
            yield Row(line, dict(zip(header, row, strict=True)))
        else:
            yield Row(line, {}, ("bad_row", f"Line {line} has {len(row)} cells; the header names {len(header)} columns."))
