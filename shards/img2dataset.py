"""What img2dataset leaves beside its tars: `NAME.parquet`, a row an attempted download, and `NAME_stats.json`, written last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import ShardError

SUCCESS = "success"
_AGAIN = "Run img2dataset again with `--incremental_mode incremental`, which downloads what is unfinished, after deleting the files of"


@dataclass(frozen=True, slots=True)
class Downloads:
    """What img2dataset attempted for a data set."""

    attempted: int
    """Rows of its tables."""
    outcomes: dict[str, int]
    """`success`, or the error, to how often; most frequent first."""

    def __str__(self) -> str:
        """Give one line."""
        failed = [f"{count} {outcome}" for outcome, count in self.outcomes.items() if outcome != SUCCESS]
        told = "; ".join(failed[:5]) + (f"; and {len(failed) - 5} other reasons" if len(failed) > 5 else "")
        return f"img2dataset: {self.outcomes.get(SUCCESS, 0)} of {self.attempted} downloads succeeded" + (f"; {told}" if told else "")


def is_output(folder: Path) -> bool:
    """Tell whether img2dataset wrote into a folder: it holds a table and the statistics of one tar."""
    return any(path.with_name(path.name.removesuffix("_stats.json") + ".parquet").is_file() for path in folder.glob("*_stats.json"))


def check(tar: Path, keys: Sequence[str]) -> None:
    """Check that a tar of img2dataset is finished and holds exactly the samples that its table and statistics say.

    Args:
        tar: one shard.
        keys: of its samples.

    Raises:
        ShardError: it is unfinished, or names what differs.
    """
    stats = _statistics(tar)
    table = _read(tar)
    succeeded = set(table.filter(pc.equal(table["status"], SUCCESS))["key"].to_pylist())
    _compare(tar, "says to have been downloaded, and the tar lacks", sorted(succeeded - set(keys)))
    _compare(tar, "does not know as downloaded, and the tar holds", sorted(set(keys) - succeeded))
    if stats.get("successes") != len(keys):
        raise ShardError(
            f"{_beside(tar, '_stats.json').name!r} counts {stats.get('successes')} downloads and {tar.name!r} holds {len(keys)} samples: "
            f"they are not of one run. {_AGAIN} {tar.stem!r}."
        )


def metadata(tar: Path, keys: Sequence[str]) -> pa.Table:
    """Return the rows of a tar's table (url, caption, sha256, original_width ...) in the order of some keys.

    Raises:
        ShardError: there is no sound table, or it lacks a key.
    """
    table = _read(tar)
    places = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"])
    if places.null_count:
        missing = next(key for key, place in zip(keys, places.to_pylist(), strict=True) if place is None)
        raise ShardError(f"{tar.name}:{missing}: there is no row for this key in {_beside(tar, '.parquet').name!r}.")
    return table.take(places)


def downloads(tars: Sequence[Path]) -> Downloads:
    """Sum up the tables of some tars.

    Raises:
        ShardError: one has no sound table.
    """
    outcomes: Counter[str] = Counter()
    for tar in tars:
        for row in _read(tar).select(["status", "error_message"]).to_pylist():
            outcomes[SUCCESS if row["status"] == SUCCESS else row["error_message"] or row["status"]] += 1
    return Downloads(sum(outcomes.values()), dict(outcomes.most_common()))


def _statistics(tar: Path) -> dict[str, Any]:
    path = _beside(tar, "_stats.json")
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise ShardError(
            f"The tar {str(tar)!r} is unfinished: img2dataset was ended before it wrote {path.name!r}. {_AGAIN} {tar.stem!r}."
        ) from e
    except (OSError, ValueError) as e:
        raise ShardError(f"{str(path)!r} is damaged ({e}). {_AGAIN} {tar.stem!r}.") from e
    if not isinstance(found, dict):
        raise ShardError(f"{str(path)!r} is damaged (no mapping). {_AGAIN} {tar.stem!r}.")
    return found


def _read(tar: Path) -> pa.Table:
    path = _beside(tar, ".parquet")
    try:
        table = pq.read_table(path, memory_map=False)
        table.select(["key", "status", "error_message"])
    except FileNotFoundError as e:
        raise ShardError(f"The tar {str(tar)!r} has no table {path.name!r} beside it. {_AGAIN} {tar.stem!r}.") from e
    except (pa.ArrowException, OSError, KeyError) as e:
        raise ShardError(f"{str(path)!r} is no table of img2dataset's ({e}). {_AGAIN} {tar.stem!r}.") from e
    return table


def _compare(tar: Path, problem: str, keys: list[str]) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        named = ", ".join(f"{tar.name}:{key}" for key in keys[:3])
        raise ShardError(f"{_beside(tar, '.parquet').name!r} {problem} {named}{more}. {_AGAIN} {tar.stem!r}.")


def _beside(tar: Path, suffix: str) -> Path:
    return tar.with_name(tar.name.removesuffix(".tar") + suffix)
