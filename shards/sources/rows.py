"""Rows of csv, tsv and jsonl tables as mappings; text that is not UTF-8 comes as lone surrogates, to be judged row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.config import TableConfig
from shards.errors import SourceError

MOST_LINES = 50
"""Of one row, most of which look like rows: an open quote has swallowed them."""


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
        rows = list(_rows(file, stream, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise SourceError(f"The table {str(file)!r} is empty. Its first line must name the columns.")
    header = rows[0].cells
    if header is None:
        raise SourceError(f"The first line of the table {str(file)!r}, which names its columns, has a quote that is not closed. Mend it.")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise SourceError(f"The table {str(file)!r} names the column {twice[0]!r} more than once. Give its columns names of their own.")
    return _named(header, rows[1:])


@dataclass(frozen=True, slots=True)
class _Parsed:
    first: int
    """Number of its first line, from 1."""
    last: int
    cells: list[str] | None
    """None where text follows a closed quote and the row has several lines: the quote was meant to be none; or where it is mostly lines
    that look like rows, and very many of them."""


def _rows(file: Path, stream: io.StringIO, *, delimiter: str, quoting: Literal[0, 3]) -> Iterator[_Parsed]:
    """Yield the rows that are not empty. Within one line, text after a closed quote belongs to the cell, as spreadsheets read it.

    Raises:
        SourceError: a quote is closed nowhere.
    """
    read: list[str] = []
    """Lines of the row that is being read."""

    def lines() -> Iterator[str]:
        for text in stream:
            read.append(text)
            yield text

    reader, before = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True), 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as e:
            if "unexpected end" in str(e):
                raise SourceError(
                    f"The table {str(file)!r} opens a quote in the row of line {before + 1} that is closed nowhere: all that follows would "
                    "be one cell. Mend the row, or set table.quoted=false if its quotes mean nothing."
                ) from e
            if "expected after" not in str(e):
                raise SourceError(f"The table {str(file)!r} cannot be parsed at line {reader.line_num}: {e}. Mend that line.") from e
            cells = next(csv.reader(read, delimiter=delimiter, quoting=quoting)) if len(read) == 1 else None
            whole = cells is not None and not cells[-1].endswith(("\n", "\r"))  # else a quote was opened after that
            yield _Parsed(before + 1, reader.line_num, cells if whole else None)
        else:
            if cells is None:
                return
            if cells:
                alike = sum(text.count(delimiter) == len(cells) - 1 for text in read)
                swallowed = len(read) > MOST_LINES and 2 * alike > len(read)
                yield _Parsed(before + 1, reader.line_num, None if swallowed else cells)
        before = reader.line_num
        read.clear()


def _named(header: list[str], rows: list[_Parsed]) -> Iterator[Row]:
    for row in rows:
        if row.cells is None:
            reason = f"The row goes from line {row.first} to {row.last}: a quote is not closed where it should be. "
            yield Row(row.last, {}, ("bad_row", f"{reason}Mend it, or set table.quoted=false if quotes mean nothing."))
        elif len(row.cells) == len(header):
            yield Row(row.last, dict(zip(header, row.cells, strict=True)))
        else:
            yield Row(row.last, {}, ("bad_row", f"Line {row.last} has {len(row.cells)} cells; the header names {len(header)} columns."))
