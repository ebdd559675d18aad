"""What samples' json says of a task: one label, several labels or a number a sample; vocabularies and statistics over a data set."""

from __future__ import annotations

import logging
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

from shards.errors import ConfigError, SampleError
from shards.joined import JoinedReader
from shards.read import ShardReader


logger = logging.getLogger(__name__)
T = TypeVar("T")
MOST_NAMED = 8
"""Labels or fields named in one line."""


def label_of(value: Any) -> str | None:
    """Turn a json value into a label: a scalar's text, of a list the most frequent entry (the first among equals), else None.

    An empty text, as of a table's empty cell, and NaN are no labels.
    """
    if isinstance(value, list):
        counts = Counter(label for label in map(label_of, value) if label is not None)
        return max(counts, key=counts.__getitem__) if counts else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, str) and not value.strip()):
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
    return sorted(label_counts(reader, field))


def label_counts(reader: ShardReader | JoinedReader, field: str) -> Counter[str]:
    """Read every sample of a data set, count its labels, one a sample as `label_of` says, and log what was found.

    Raises:
        ConfigError: no sample has the field.
    """
    read = _Read(reader, field, label_of)
    counts = Counter(read)
    read.say(counts)
    return counts


def tag_counts(reader: ShardReader | JoinedReader, field: str) -> tuple[Counter[str], int]:
    """Read every sample of a data set: how many have each of the labels, as `labels_of` says, and how many have the field.

    Raises:
        ConfigError: no sample has a label.
    """
    counts: Counter[str] = Counter()
    samples = 0
    read = _Read(reader, field, labels_of)
    for labels in read:
        counts.update(labels)
        samples += 1
    read.say(counts)
    return counts, samples


def need_labels(reader: ShardReader | JoinedReader, field: str, labels: Sequence[str]) -> None:
    """Read a data set up to the first sample that has one of the labels.

    Raises:
        ConfigError: none has, so that nothing would be learned.
    """
    found: set[str] = set()
    read = _Read(reader, field, labels_of)
    for here in read:
        if not set(labels).isdisjoint(here):
            return
        found.update(here[: max(0, 3 - len(found))])
    seen = f"what they have is {', '.join(map(repr, sorted(found)))}" if found else read.fields_seen()
    raise ConfigError(f"`data.labels` = {list(labels)[:3]}: no sample's `data.label={field}` is one of them; {seen}. Mend the one or the other.")


def number_statistics(reader: ShardReader | JoinedReader, field: str) -> tuple[float, float]:
    """Read every sample of a data set and return mean and standard deviation of a field.

    Raises:
        ConfigError: no sample has a number there, or all have the same.
    """
    read = _Read(reader, field, number_of)
    numbers = list(read)
    if not numbers:
        raise ConfigError(f"`data.label={field}` holds a number in no sample; {read.fields_seen()}.")
    mean = math.fsum(numbers) / len(numbers)
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))
    if min(numbers) == max(numbers):
        raise ConfigError(f"`data.label={field}` is {numbers[0]:g} in every sample that has it. There is nothing to learn: name another key.")
    read.say_missing()
    return mean, std


class _Read(Generic[T]):
    """One pass over a data set: what each sample's field says, and what has to be told of those where it says nothing.

    Args:
        reader: of the data set.
        field: key of the samples' json.
        of: its value to what is wanted, or None.
    """

    def __init__(self, reader: ShardReader | JoinedReader, field: str, of: Callable[[Any], T | None]) -> None:
        self._reader, self._field, self._of = reader, field, of
        self._names: Counter[str] = Counter()
        self._samples = self._missing = 0
        self._first = ""

    def __iter__(self) -> Iterator[T]:
        for shard, rows in enumerate(self._reader.rows_per_shard):
            for row in range(rows):
                sample = self._reader[shard, row]
                try:
                    fields = sample.fields()
                except SampleError:  # the loader will quarantine it by name
                    fields = {}
                self._names.update(fields.keys())
                self._samples += 1
                found = self._of(fields.get(self._field))
                if found is not None:
                    yield found
                else:
                    self._first = self._first or sample.key
                    self._missing += 1

    def fields_seen(self) -> str:
        """The fields that there are, most common first, and the one that may be meant."""
        names = [name for name, _ in self._names.most_common(MOST_NAMED)]
        near = get_close_matches(self._field, names, 1)
        meant = f" (did you mean {near[0]!r}?)" if near and near[0] != self._field else ""
        return f"the samples' json has {', '.join(map(repr, names))}{meant}" if names else "the samples have no json"

    def say(self, counts: Counter[str]) -> None:
        """Log the most frequent labels, and what has none.

        Raises:
            ConfigError: there is none.
        """
        if not counts:
            raise ConfigError(f"`data.label={self._field}` is a field of no sample, or empty in all of them; {self.fields_seen()}.")
        shown = ", ".join(f"{textwrap.shorten(label, 24, placeholder='...')} ({n:,})" for label, n in counts.most_common(MOST_NAMED))
        more = ", ..." if len(counts) > MOST_NAMED else ""
        logger.info("labels      %s of data.label=%s: %s%s", f"{len(counts):,}", self._field, shown, more)
        self.say_missing()

    def say_missing(self) -> None:
        """Warn of samples without it."""
        if self._missing:
            logger.warning(
                "%d of %d samples have no `data.label=%s`, such as %s: the task does not learn from them",
                *(self._missing, self._samples, self._field, self._first),
            )
