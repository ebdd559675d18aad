"""Read a WebDataset tar that anybody wrote, and refuse one that is damaged or that readers would take apart wrongly."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.errors import ShardError
from shards.sample import Sample, split_name


def scan_tar(tar: Path) -> Iterator[tuple[Sample, dict[str, int]]]:
    """Yield the samples of a plain tar with the offset of each of their parts; consecutive members of one key are one sample.

    Raises:
        ShardError: not a plain tar, cut short, damaged, not to be read; a member named outside of its folder; a key that occurs twice,
            or whose parts are not neighbours.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    offsets: dict[str, int] = {}
    keys = _Keys(tar)
    for name, offset, data in _members(tar):
        split = split_name(name)
        if split is None:
            continue
        if split[0] != key:
            if key is not None:
                keys.add(key, parts, min(offsets.values()))
                yield Sample(key, parts), offsets
            key, parts, offsets = split[0], {}, {}
        ext = split[1]
        if ext in parts:
            raise ShardError(
                f"{tar.name}:{key}: the tar {str(tar)!r} holds the part {ext!r} of this sample twice. Write the tar again with unique keys."
            )
        parts[ext], offsets[ext] = data, offset
    if key is not None:
        keys.add(key, parts, min(offsets.values()))
        yield Sample(key, parts), offsets


def _members(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield (name, offset, bytes) of the regular files of a plain tar.

    tarfile ends without a word at a damaged header or a cut, hence the look at what lies where it stopped.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise ShardError(f"The tar {str(path)!r} cannot be read: {e.strerror}. Give this user the right to, or mend the disk.") from e
    try:
        with os.fdopen(os.dup(fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                _check_name(path, member.name)
                if member.issparse():
                    raise ShardError(f"The tar {str(path)!r} holds the sparse member {member.name!r}. Write it again without --sparse.")
                if member.isreg():
                    yield member.name, member.offset_data, os.pread(fd, member.size, member.offset_data)
            end = os.pread(fd, tarfile.BLOCKSIZE, tar.offset)
        if end != bytes(tarfile.BLOCKSIZE):
            raise ShardError(_broken(path, f"it has no end-of-archive mark at byte {tar.offset}"))
    except tarfile.ReadError as e:
        raise ShardError(_broken(path, str(e))) from e
    finally:
        os.close(fd)


def _broken(path: Path, problem: str) -> str:
    return (
        f"The tar {str(path)!r} is cut short, damaged or not a plain tar ({problem}). "
        "Fetch or write it again, or delete it, and repeat the command."
    )


def _check_name(tar: Path, name: str) -> None:
    """Refuse a member that would be written outside the folder in which somebody unpacks the tar, or that no sidecar can name.

    Raises:
        ShardError: an absolute name, one with `..` in it, or one that is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError as e:
        raise ShardError(
            f"The tar {str(tar)!r} holds a member {name!r} whose name is not UTF-8. Write the tar again with names in UTF-8."
        ) from e
    if not name.startswith("/") and ".." not in name.split("/"):
        return
    kind = "an absolute name" if name.startswith("/") else "'..' in its name"
    raise ShardError(
        f"{tar.name}:{name}: the tar {str(tar)!r} holds a member with {kind}, which would be unpacked outside the folder it is meant for. "
        "Do not unpack it; fetch it from another place, or write it again with names below one folder."
    )


class _Keys:
    """The samples of one tar so far: each key must stand for one sample, and its parts must be neighbours."""

    def __init__(self, tar: Path) -> None:
        self._tar = tar
        self._first: dict[str, tuple[int, frozenset[str]]] = {}

    def add(self, key: str, extensions: Iterable[str], offset: int) -> None:
        """Enter a group of neighbouring members.

        Args:
            key: of the group.
            extensions: of its parts.
            offset: of the first byte of its first part.

        Raises:
            ShardError: an earlier group of this tar has that key.
        """
        here = frozenset(extensions)
        if key not in self._first:
            self._first[key] = offset, here
            return
        earlier, before = self._first[key]
        where = f"{self._tar.name}:{key}: the tar {str(self._tar)!r} holds"
        if before & here:
            raise ShardError(
                f"{where} two samples of this key, at bytes {earlier} and {offset}: which of them is meant cannot be known. Write it again "
                "with unique keys; `mmscale shards write source=webdataset` does so and leaves such samples out."
            )
        raise ShardError(
            f"{where} its parts apart from each other: {_listed(before)} at byte {earlier}, {_listed(here)} at byte {offset}. "
            "Readers of WebDataset tars would take them for two samples. Write it again in the order of names (`tar --sort=name`)."
        )


def _listed(extensions: frozenset[str]) -> str:
    return ", ".join(sorted(extensions))
