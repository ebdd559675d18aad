"""What every source makes: light records in a fixed order, and from a record a raw sample."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from shards.errors import SampleError, SourceError

# A tar header has room for 100 bytes of `KEY.EXT`.
MAX_KEY_BYTES = 80

# Faults of one path; any other OSError is a fault of the machine and fails the run, to be repeated.
_PATH_FAULTS = {
    errno.ENOENT: ("missing_file", "There is no such file."),
    errno.ENOTDIR: ("missing_file", "There is no such file."),
    errno.ELOOP: ("missing_file", "The path is a loop of links."),
    errno.ENAMETOOLONG: ("missing_file", "The path is too long."),
    errno.EISDIR: ("not_a_file", "The path is a folder."),
    errno.EACCES: ("not_readable", "The permissions forbid reading it."),
    errno.EPERM: ("not_readable", "The permissions forbid reading it."),
}

_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\\]+")


@dataclass(frozen=True, slots=True)
class Record:
    """One raw sample that a source has listed."""

    key: str
    """Key of the sample to be; unique among the records without a problem."""
    where: str
    """Where it comes from, for people: `cats/1.jpg` or `pairs.csv:12`."""
    locator: Any = None
    """What `Source.load` needs; plain values, whose repr says whether the source has changed."""
    problem: tuple[str, str] | None = None
    """(reason, detail) of a sample that the listing alone already refuses."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as the source holds it, nothing checked or cleaned."""

    image: bytes | None = None
    pictures: Sequence[bytes] = ()
    """Several images of one sample, in their order, instead of `image`."""
    audio: bytes | None = None
    video: bytes | None = None
    captions: Sequence[str | bytes] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, bytes] = field(default_factory=dict)
    """Further parts by extension, which go into the shard as they are."""


class LazyRecords(Sequence[Record]):
    """Records that are made when they are asked for, as a hundred million of them do not fit into memory."""

    @abstractmethod
    def digest(self) -> str:
        """Digest of what is listed, without making the records."""


class Source(Protocol):
    """A kind of raw data."""

    def records(self) -> Sequence[Record]:
        """List every sample in an order that depends on the data alone; see LazyRecords for more than fit into memory.

        Raises:
            SourceError: the source cannot be listed at all.
        """

    def load(self, record: Record) -> RawSample:
        """Read one listed sample; called in the worker processes.

        Raises:
            SampleError: this sample cannot be read; it is quarantined.
            SourceError: reading failed in a way that concerns more than this sample.
        """


def safe_key(name: str) -> str:
    """Turn a relative path without its extension into a key: no `/`, no `.`, no control characters, at most 80 bytes."""
    key = unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8"))
    key = _UNSAFE.sub("_", key.replace("/", "__").replace(".", "-"))
    key = key.lstrip("_") or "_"  # WebDataset keeps names that begin with two underscores for metadata
    encoded = key.encode("utf-8")
    if len(encoded) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    head = encoded[: MAX_KEY_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    return f"{head}~{digest}"


def refuse_shared_keys(records: Iterable[Record]) -> list[Record]:
    """Mark every record whose key another one has too: which of them is meant cannot be known."""
    listed = list(records)
    holders: dict[str, list[int]] = {}
    for number, record in enumerate(listed):
        if record.problem is None:
            holders.setdefault(record.key, []).append(number)
    for key, numbers in holders.items():
        if len(numbers) == 1:
            continue
        names = ", ".join(listed[n].where for n in numbers[:3]) + (", ..." if len(numbers) > 3 else "")
        for number in numbers:
            problem = ("duplicate_key", f"{len(numbers)} inputs have the key {key!r}: {names}.")
            listed[number] = replace(listed[number], problem=problem)
    return listed


def read_file(key: str, path: str | Path, max_bytes: int) -> bytes:
    """Read one regular file.

    Raises:
        SampleError: it is missing, not a regular file, not readable or larger than `max_bytes`.
        SourceError: the disk failed.
    """
    try:
        # O_NONBLOCK: a named pipe must not stop the writer for ever; it is refused below.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SampleError(key, "not_a_file", f"{Path(path).name} is not a regular file.")
            if status.st_size > max_bytes:
                raise SampleError(key, "file_too_large", f"{Path(path).name} has {status.st_size} bytes; the limit is {max_bytes}.")
            return file.read()
    except ValueError as e:  # a NUL character in the path
        raise SampleError(key, "missing_file", f"{str(path)!r} cannot be a path.") from e
    except OSError as e:
        if e.errno not in _PATH_FAULTS:
            raise SourceError(
                f"Reading {str(path)!r} failed: {e}. Mend the disk or the mount and repeat the command; it goes on from here."
            ) from e
        reason, detail = _PATH_FAULTS[e.errno]
        raise SampleError(key, reason, f"{str(path)!r}: {detail}") from e
