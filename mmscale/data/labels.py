"""Labels of samples: one string a sample, from whatever its json holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

from shards.errors import ConfigError
from shards.joined import JoinedReader
from shards.read import ShardReader


def label_of(value: Any) -> str | None:
    """Turn a json value into a label: a scalar's text, of a list the most frequent entry (the first among equals), else None."""
    if isinstance(value, list):
        counts = Counter(label for label in map(label_of, value) if label is not None)
        return max(counts, key=counts.__getitem__) if counts else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (str, int, float)) else None


def label_vocabulary(reader: ShardReader | JoinedReader, field: str) -> list[str]:
    """Read every sample of a data set and return the sorted distinct labels of a field.

    Raises:
        ConfigError: no sample has the field.
    """
    found = set()
    for shard, rows in enumerate(reader.rows_per_shard):
        for row in range(rows):
            label = label_of(reader[shard, row].fields().get(field))
            if label is not None:
                found.add(label)
    if not found:
        raise ConfigError(f"`data.label={field}` is a field of no sample. Name a key of the samples' json, or list `data.labels`.")
    return sorted(found)
