"""NLVR and NLVR2: a sentence is true or false of a picture, or of a pair of photographs. Source: Suhr et al. 2017 and 2019, lil-lab/nlvr.

Both have a json object a line. NLVR draws six permutations of its three boxes for each; NLVR2 names the pair by its identifier.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.config import WriteConfig
from shards.errors import SourceError
from shards.sources.annotated import AnnotatedSource, Entry, media_folder, parse_json, read_text
from shards.sources.record import Record, refuse_shared_keys, safe_key

KIND = "NLVR file of a json object a line"
PERMUTATIONS = 6
_KEPT = ("identifier", "synset", "query", "directory", "writer")


class NlvrSource(AnnotatedSource):
    """One sample a sentence and picture (NLVR) or pair (NLVR2, two pictures).

    Fields `sentence`, `label`, which is true or false, and `group`, which samples share that consistency counts together.
    """

    def __init__(self, config: WriteConfig) -> None:
        self._path = Path(config.path or "")
        beside, split = self._path.parent, self._path.stem
        usual = (beside / "images", beside.parent / "images" / split, beside.parent / split, beside / split, beside)
        super().__init__(config, media_folder(config, usual))

    def records(self) -> list[Record]:
        """List the examples in the file's order; of NLVR all permutations of each."""
        return refuse_shared_keys(record for line, row in _rows(self._path) for record in self._records_of(line, row))

    def _records_of(self, line: int, row: dict[str, Any]) -> Iterator[Record]:
        identity, directory = str(row["identifier"]), row.get("directory")
        fields = {"sentence": str(row["sentence"])} | {key: row[key] for key in _KEPT if key in row}
        if row.get("label") is not None:  # hidden sets have none
            fields["label"] = str(row["label"]).lower()
        where = f"{self._path.name}:{line}"
        parts = identity.split("-")
        below = "" if directory is None else f"{directory}/"
        if len(parts) == 4:
            fields["group"] = f"{parts[0]}-{parts[1]}-{parts[3]}"
            pair = "-".join(parts[:3])
            below = below if (self._folder / below).is_dir() else ""
            images = tuple(f"{below}{pair}-img{number}.png" for number in range(2))
            yield Record(safe_key(identity), where, Entry(images=images, fields=fields))
            return
        fields["group"] = f"{self._path.stem}-{parts[0]}"
        for number in range(PERMUTATIONS):
            name = f"{self._path.stem}-{identity}-{number}"
            yield Record(safe_key(name), where, Entry(images=(f"{below}{name}.png",), fields=fields))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, object) of each line.

    Raises:
        SourceError: a line that is no example, or no line at all.
    """
    found = False
    for number, line in enumerate(read_text(path, KIND).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, path, KIND)
        if not isinstance(row, dict) or not all(row.get(key) for key in ("identifier", "sentence")):
            raise SourceError(f"Line {number} of {str(path)!r} is no NLVR example: it needs `identifier` and `sentence`; it is {line:.80}.")
        found = True
        yield number, row
    if not found:
        raise SourceError(f"The {KIND} {str(path)!r} is empty. Give another `path`.")
