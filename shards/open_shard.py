"""One shard held open: its tar and its sidecar, and the checked read of a sample."""

from __future__ import annotations

import google_crc32c
import pyarrow as pa

from shards.digest import buffer_sha256
from shards.errors import IntegrityError, ShardError
from shards.manifest import ShardInfo, sidecar_name
from shards.mask import kept_rows
from shards.sample import Sample
from shards.sidecar import parse_index
from shards.store.base import Store, Stored
from shards.store.place import is_url


class OpenShard:
    """An open tar with its sidecar; what is behind it is closed when nobody refers to it any more.

    Args:
        store: where it lies.
        info: its row of the manifest.

    Raises:
        FileNotFoundError: the tar is missing.
        OSError: the system refuses to open it.
        ShardError: its sidecar is missing or another one than the manifest's, or the store refuses.
    """

    def __init__(self, store: Store, info: ShardInfo) -> None:
        self.name = info.shard
        self._root = store.root
        tar, sidecar = stored(info)
        self._tar = store.tar(tar)
        self.table = parse_index(_sidecar(store, sidecar), store.root, sidecar.name)
        # None: every row of the tar is one of the data set, and nothing is looked up.
        self._kept = None if info.mask is None else kept_rows(info.mask, self.table.num_rows, info.shard)
        # Flat child arrays as views of the mapped file: nested pyarrow or numpy scalars a sample would cost more than its read.
        parts = _only_chunk(self.table["parts"])
        flat = parts.values
        self._keys, self._exts = _Strings(_only_chunk(self.table["key"])), _Strings(flat.field("ext"))
        self._starts = memoryview(parts.offsets.to_numpy())
        self._offsets, self._sizes, self._crcs = (memoryview(flat.field(name).to_numpy()) for name in ("offset", "size", "crc32c"))

    @property
    def stale(self) -> bool:
        """Whether the cache has deleted its file, which takes space for as long as it is open."""
        return self._tar.stale

    def key(self, row: int) -> str:
        """Return the key of a sample.

        Raises:
            IndexError: no such row.
        """
        return self._keys[self._tar_row(row)]

    def kept_table(self) -> pa.Table:
        """Return the rows of the sidecar that belong to the data set."""
        return self.table if self._kept is None else self.table.take(self._kept)

    def sample(self, row: int) -> Sample:
        """Read a sample.

        Raises:
            IndexError: no such row.
            IntegrityError: its bytes differ from the checksum, or the tar ends before them.
            OSError, ShardError: it cannot be read.
        """
        key = self.key(row)
        begin, end, numbers = self._span(row)
        # The parts of a sample lie next to each other: one request for all of them, 512-byte headers included.
        data = self._tar.read(begin, end - begin)
        parts: dict[str, bytes] = {}
        for i in numbers:
            start = self._offsets[i] - begin
            part = data[start : start + self._sizes[i]]
            if google_crc32c.value(part) != self._crcs[i]:
                raise IntegrityError(self._fault(key, i, len(part)))
            parts[self._exts[i]] = part
        return Sample(key, parts)

    def distrust(self, row: int) -> None:
        """Drop the system's copy of a sample, so that the next read comes from the disk itself."""
        begin, end, _ = self._span(row)
        self._tar.distrust(begin, end - begin)

    def _tar_row(self, row: int) -> int:
        rows = self.table.num_rows if self._kept is None else len(self._kept)
        if not 0 <= row < rows:
            raise IndexError(f"There is no row {row} in {self.name}: it has {rows}.")
        return row if self._kept is None else int(self._kept[row])

    def _span(self, row: int) -> tuple[int, int, range]:
        tar_row = self._tar_row(row)
        numbers = range(self._starts[tar_row], self._starts[tar_row + 1])
        last = numbers[-1]
        return self._offsets[numbers[0]], self._offsets[last] + self._sizes[last], numbers

    def _fault(self, key: str, i: int, got: int) -> str:
        if got < self._sizes[i]:
            problem = f"is cut off: the tar holds {got} of its {self._sizes[i]} bytes"
        else:
            problem = f"does not match its checksum crc32c {self._crcs[i]:08x}"
        return (
            f"{self.name}:{key}: the part {self._exts[i]!r} at byte {self._offsets[i]} {problem}. "
            f"The shard in {self._root!r} was damaged after it was written: restore it from a copy or write it again."
        )


def stored(info: ShardInfo) -> tuple[Stored, Stored]:
    """Return what the manifest says of a shard's tar and sidecar."""
    return Stored(info.shard, info.bytes, info.sha256), Stored(sidecar_name(info.shard), None, info.index_sha256)


def _sidecar(store: Store, sidecar: Stored) -> pa.Buffer:
    """Load a sidecar; wrong bytes are fetched once more."""
    for _ in range(2):
        try:
            found = store.whole(sidecar.name, sidecar.sha256)
        except FileNotFoundError as e:
            raise ShardError(f"There is no sidecar {f'{store.root}/{sidecar.name}'!r}. {_mend(store.root)}") from e
        if buffer_sha256(found) == sidecar.sha256:
            return found
        store.discard(sidecar)
    place = f"{store.root}/{sidecar.name}"
    raise ShardError(f"The sidecar {place!r} differs from the one in the manifest: it was replaced or damaged. {_mend(store.root)}")


def _mend(root: str) -> str:
    if is_url(root):
        return "Upload the data set again, its manifest last."
    return f"Restore it, or delete it and run `mmscale shards index {root}`."


class _Strings:
    """The strings of an Arrow array, decoded one by one straight from its buffers."""

    def __init__(self, array: pa.StringArray) -> None:
        _, offsets, text = array.buffers()
        # the buffer may be padded to a length that is no multiple of an offset's
        self._ends = memoryview(offsets)[: 4 * (array.offset + len(array) + 1)].cast("i")[array.offset :] if len(array) else memoryview(b"")
        self._text = memoryview(text or b"")

    def __getitem__(self, i: int) -> str:
        return str(self._text[self._ends[i] : self._ends[i + 1]], "utf-8")


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
