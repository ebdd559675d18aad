"""What samples' json says of a task: one label, several labels or a number a sample; vocabularies and statistics over a data set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, (str, int, float)) else None


def labels_of(value: Any) -> list[str] | None:
    """Turn a json value into the labels that hold: a list's different entries, of which there may be none, a scalar's text, else None."""
    entries = value if isinstance(value, list) else [value]
    found = [label for label in map(label_of, entries) if label is not None]
    return list(dict.fromkeys(found)) if found or value == [] else None


def number_of(value: Any) -> float | None:
    """Turn a json value into a finite number: a number, the text of one, of a list of several ratings their mean, else None."""
    if isinstance(value, list):
        numbers = [number for number in map(number_of, value) if number is not None]
        return sum(numbers) / len(numbers) if numbers else None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def label_vocabulary(reader: ShardReader | JoinedReader, field: str) -> list[str]:
    """Read every sample of a data set and return the sorted distinct labels of a field, one a sample as `label_of` says.

    Raises:
        ConfigError: no sample has the field.
    """
    return sorted(label_counts(reader, field) or _no_label(field))


def label_counts(reader: ShardReader | JoinedReader, field: str) -> Counter[str]:
    """Read every sample of a data set and count its labels, one a sample as `label_of` says."""
    return Counter(label for label in map(label_of, _values(reader, field)) if label is not None)


def tag_counts(reader: ShardReader | JoinedReader, field: str) -> tuple[Counter[str], int]:
    """Read every sample of a data set: how many have each of the labels, as `labels_of` says, and how many have the field.

    Raises:
        ConfigError: no sample has a label.
    """
    counts: Counter[str] = Counter()
    samples = 0
    for labels in map(labels_of, _values(reader, field)):
        if labels is not None:
            counts.update(labels)
            samples += 1
    return counts or _no_label(field), samples


def need_labels(reader: ShardReader | JoinedReader, field: str, labels: Sequence[str]) -> None:
    """Read a data set up to the first sample that has one of the labels.

    Raises:
        ConfigError: none has, so that nothing would be learned.
    """
    found: set[str] = set()
    for value in _values(reader, field):
        here = labels_of(value) or []
        if not set(labels).isdisjoint(here):
            return
        found.update(here[: max(0, 3 - len(found))])
    seen = f"what they have is {', '.join(map(repr, sorted(found)))}" if found else f"none has the field {field!r}"
    raise ConfigError(f"`data.labels` = {list(labels)[:3]}: no sample's `data.label={field}` is one of them; {seen}. Mend the one or the other.")


def _no_label(field: str) -> NoReturn:
    raise ConfigError(f"`data.label={field}` is a field of no sample. Name a key of the samples' json, or list `data.labels`.")


def number_statistics(reader: ShardReader | JoinedReader, field: str) -> tuple[float, float]:
    """Read every sample of a data set and return mean and standard deviation of a field.

    Raises:
        ConfigError: no sample has a number there, or all have the same.
    """
    numbers = [number for number in map(number_of, _values(reader, field)) if number is not None]
    if not numbers:
        raise ConfigError(f"`data.label={field}` holds a number in no sample. Name a key of the samples' json that holds one.")
    mean = math.fsum(numbers) / len(numbers)
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))
    if min(numbers) == max(numbers):
        raise ConfigError(f"`data.label={field}` is {numbers[0]:g} in every sample that has it. There is nothing to learn: name another key.")
    return mean, std


def _values(reader: ShardReader | JoinedReader, field: str) -> Iterator[Any]:
    for shard, rows in enumerate(reader.rows_per_shard):
        for row in range(rows):
            yield reader[shard, row].fields().get(field)
