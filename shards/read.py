"""Read any sample of a data set by (shard, row): one checked read of exactly its bytes, no scan of its tar."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa

from shards.errors import IntegrityError, ShardError
from shards.index import file_sha256, read_index
from shards.manifest import Manifest, ShardInfo, read_manifest, sidecar_path
from shards.sample import Sample

OPEN_SHARDS = 128
"""Shards a reader keeps open by default: a file descriptor and a mapped sidecar each."""
RETRY_WAITS_S = (0.05, 0.2, 0.8)
"""Pauses before each further attempt at a read that the system refused."""


class ShardReader:
    """Random access to the samples of a data set folder.

    `reader[shard, row]` returns a `Sample` whose every part matched its checksum. Threads may share a reader, forked processes may go on
    with their parent's, and pickling sends the path alone.

    Args:
        path: the data set folder, with its manifest.
        open_shards: how many shards are kept open.
        check_files: False opens a data set whose shards are not all there, as verification must.

    Raises:
        ShardError: no data set there, or an unfinished one.
    """

    def __init__(self, path: str | Path, *, open_shards: int = OPEN_SHARDS, check_files: bool = True) -> None:
        self.path = Path(path)
        self.open_shards = open_shards
        self.manifest: Manifest = read_manifest(self.path, check_files=check_files)
        self.rows_per_shard: tuple[int, ...] = self.manifest.rows_per_shard
        self._rows = self.manifest.rows
        self._forget()

    def __len__(self) -> int:
        """Samples in the data set."""
        return self._rows

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Read one sample.

        Raises:
            IndexError: no such shard or row.
            IntegrityError: its bytes differ from the checksum, or the tar ends before them, also when fetched once more.
            ShardError: its tar or sidecar is missing, or the system keeps refusing to read it.
        """
        shard, row = place
        opened = self._open(shard)
        try:
            return opened.sample(row)
        except (OSError, IntegrityError) as e:
            return self._again(shard, row, e)

    def key(self, shard: int, row: int) -> str:
        """Return the key of a sample without reading it."""
        return self._open(shard).key(row)

    def index(self, shard: int) -> pa.Table:
        """Return the sidecar of a shard (columns of `shards.index.SCHEMA`), mapped into memory."""
        return self._open(shard).table

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path, not the open files."""
        return {"path": self.path, "open_shards": self.open_shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the same data set in another process."""
        self.__init__(state["path"], open_shards=state["open_shards"])  # type: ignore[misc]

    def _open(self, shard: int) -> _OpenShard:
        if self._pid != os.getpid():
            self._forget()  # another thread of the parent may have held the lock at the fork
        with self._lock:
            opened = self._opened.get(shard)
            if opened is not None:
                self._opened.move_to_end(shard)
                return opened
        if not 0 <= shard < len(self.manifest.shards):
            raise IndexError(f"There is no shard {shard}: the data set has {len(self.manifest.shards)}.")
        opened = self._attempt(shard)
        with self._lock:
            self._opened[shard] = opened
            while len(self._opened) > self.open_shards:
                self._opened.popitem(last=False)  # closed when the last thread that reads from it lets go
        return opened

    def _attempt(self, shard: int) -> _OpenShard:
        """Open a shard, again after each pause where the system refuses."""
        info = self.manifest.shards[shard]
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                return _OpenShard(self.path, info)
            except FileNotFoundError as e:
                raise ShardError(f"The shard {info.shard!r} is no longer in {str(self.path)!r}. Copy it there again.") from e
            except OSError as e:
                if wait_s is None:
                    raise ShardError(_refused(info.shard, e)) from e
                time.sleep(wait_s)
        raise AssertionError("unreachable")

    def _again(self, shard: int, row: int, error: Exception) -> Sample:
        """Read a sample once more where its bytes were wrong, a few times more where the system refused."""
        info = self.manifest.shards[shard]
        for wait_s in RETRY_WAITS_S:
            self._drop(shard)
            if isinstance(error, OSError):
                time.sleep(wait_s)
            opened = self._open(shard)
            try:
                opened.let_cache_go(row)
                return opened.sample(row)
            except IntegrityError:
                raise
            except OSError as e:
                error = e
        raise ShardError(_refused(f"{info.shard}:{self.key(shard, row)}", error)) from error

    def _drop(self, shard: int) -> None:
        with self._lock:
            self._opened.pop(shard, None)

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()


class _OpenShard:
    """An open tar with its sidecar; the file is closed when nobody refers to it any more."""

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        self.name = info.shard
        tar = folder / info.shard
        self._fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        sidecar = sidecar_path(tar)
        if file_sha256(sidecar) != info.index_sha256:
            raise ShardError(
                f"The sidecar {str(sidecar)!r} differs from the one in the manifest: it was replaced or damaged. "
                f"Restore it, or delete it and run `mmscale shards index {folder}`."
            )
        self.table = read_index(sidecar)
        # Flat child arrays as views of the mapped file: nested pyarrow or numpy scalars a sample would cost more than its read.
        parts = _only_chunk(self.table["parts"])
        flat = parts.values
        self._keys, self._exts = _Strings(_only_chunk(self.table["key"])), _Strings(flat.field("ext"))
        self._starts = memoryview(parts.offsets.to_numpy())
        self._offsets, self._sizes, self._crcs = (memoryview(flat.field(name).to_numpy()) for name in ("offset", "size", "crc32c"))

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)

    def key(self, row: int) -> str:
        if not 0 <= row < self.table.num_rows:
            raise IndexError(f"There is no row {row} in {self.name}: it has {self.table.num_rows}.")
        return self._keys[row]

    def sample(self, row: int) -> Sample:
        key = self.key(row)
        begin, end, numbers = self._span(row)
        # The parts of a sample lie next to each other: one request for all of them, 512-byte headers included.
        data = os.pread(self._fd, end - begin, begin)
        parts: dict[str, bytes] = {}
        for i in numbers:
            start = self._offsets[i] - begin
            part = data[start : start + self._sizes[i]]
            if google_crc32c.value(part) != self._crcs[i]:
                raise IntegrityError(self._fault(key, i, len(part)))
            parts[self._exts[i]] = part
        return Sample(key, parts)

    def let_cache_go(self, row: int) -> None:
        """Ask the system to forget its copy of a sample, so that the next read comes from the disk itself."""
        begin, end, _ = self._span(row)
        os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _span(self, row: int) -> tuple[int, int, range]:
        numbers = range(self._starts[row], self._starts[row + 1])
        last = numbers[-1]
        return self._offsets[numbers[0]], self._offsets[last] + self._sizes[last], numbers

    def _fault(self, key: str, i: int, got: int) -> str:
        if got < self._sizes[i]:
            problem = f"is cut off: the tar holds {got} of its {self._sizes[i]} bytes"
        else:
            problem = f"does not match its checksum crc32c {self._crcs[i]:08x}"
        return (
            f"{self.name}:{key}: the part {self._exts[i]!r} at byte {self._offsets[i]} {problem}. "
            "The shard was damaged after it was written: restore it from a copy or write it again."
        )


class _Strings:
    """The strings of an Arrow array, decoded one by one straight from its buffers."""

    def __init__(self, array: pa.StringArray) -> None:
        _, offsets, text = array.buffers()
        self._ends = memoryview(offsets)[: 4 * (array.offset + len(array) + 1)].cast("i")[array.offset :] if len(array) else memoryview(b"")
        self._text = memoryview(text or b"")

    def __getitem__(self, i: int) -> str:
        return str(self._text[self._ends[i] : self._ends[i + 1]], "utf-8")


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _refused(where: str, error: Exception) -> str:
    attempts = len(RETRY_WAITS_S) + 1
    return f"{where} cannot be read, {attempts} times tried: {error}. Check the disk or the mount it is on."
