"""Folders of recordings with a csv of classes and folds: ESC-50 and its like. Source: Piczak 2015; Salamon et al. 2014 (UrbanSound8K)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.config import TableConfig, WriteConfig
from shards.errors import SourceError
from shards.sources.annotated import AnnotatedSource, Entry, check_splits
from shards.sources.record import Record, refuse_shared_keys, safe_key
from shards.sources.rows import Row, read_rows

FILE_COLUMNS = ("filename", "slice_file_name")
LABEL_COLUMNS = ("category", "class")


class Esc50Source(AnnotatedSource):
    """One sample a recording: every column of the csv is a field, `fold` a number, and `label` the name of its class.

    `path` is the data set's folder (`meta/*.csv` or `metadata/*.csv`, recordings in `audio/` or `audio/foldN/`), or the csv itself.
    """

    def __init__(self, config: WriteConfig) -> None:
        given = Path(config.path or "")
        self._path = given if given.is_file() else _only_csv(given)
        super().__init__(config, self._path.parent.parent / "audio")
        if not self._folder.is_dir():
            raise SourceError(f"There is no folder of recordings at {str(self._folder)!r}, beside that of {self._path.name}. Put it there.")

    def records(self) -> list[Record]:
        """List the recordings of the chosen folds in the csv's order."""
        rows = list(read_rows(self._path, TableConfig()))
        header = next((row.cells for row in rows if row.problem is None), None)
        if header is None:
            raise SourceError(f"The table {str(self._path)!r} has no rows. Give another `path`.")
        file, label, fold = (self._column(header, names) for names in (FILE_COLUMNS, LABEL_COLUMNS, ("fold",)))
        folds = self._config.annotations.splits
        check_splits(folds, (row.cells[fold] for row in rows if row.problem is None), self._path)
        return refuse_shared_keys(
            self._record(row, file, label) for row in rows if row.problem is not None or not folds or row.cells[fold] in folds
        )

    def _record(self, row: Row, file: str, label: str) -> Record:
        where = f"{self._path.name}:{row.line}"
        if row.problem is not None:
            return Record(safe_key(f"{self._path.stem}-{row.line}"), where, None, row.problem)
        name, fold = row.cells[file], row.cells["fold"]
        fields = row.cells | {"fold": int(fold) if fold.isdecimal() else fold, "label": row.cells[label]}
        in_fold = f"fold{fold}/{name}"
        entry = Entry(audio=in_fold if (self._folder / in_fold).is_file() else name, fields=fields)
        return Record(safe_key(Path(name).stem), where, entry)

    def _column(self, cells: dict[str, Any], names: tuple[str, ...]) -> str:
        found = next((name for name in names if name in cells), None)
        if found is None:
            raise SourceError(
                f"{str(self._path)!r} is no csv of recordings: it has no column {' or '.join(names)}; it has {', '.join(cells)}. "
                "Any other table is read by source=table."
            )
        return found


def _only_csv(folder: Path) -> Path:
    found = [file for name in ("meta", "metadata") for file in sorted((folder / name).glob("*.csv"))]
    if len(found) != 1:
        what = "several csv files" if found else "no csv file"
        raise SourceError(f"There is {what} in meta/ or metadata/ of {str(folder)!r}. Give the `path` of the csv itself.")
    return found[0]
