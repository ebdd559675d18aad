"""Write the kept samples of data sets into new tars: the same bytes for any number of processes, after any number of kills."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from shards.commit import commit_file, temporary
from shards.errors import ShardError
from shards.index import shard_info
from shards.manifest import Manifest, ShardInfo, sidecar_path
from shards.pool import run
from shards.progress import Progress
from shards.sidecar import IndexEntry, PartEntry, read_index, write_index
from shards.tar import TarStream
from shards.versions.rows import ShardRows


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring kept samples of one shard."""

    base: Path
    info: ShardInfo
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _NewShard:
    """One tar to write."""

    tar: Path
    pieces: tuple[_Piece, ...]

    @property
    def rows(self) -> int:
        """Samples of it."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def rewrite_shards(
    manifests: Sequence[Manifest], out: Path, rows_per_shard: int, processes: int, bar: Progress
) -> tuple[list[ShardInfo], int]:
    """Write the shards that are not there yet.

    Args:
        manifests: the data sets, one after another.
        out: folder of the new shards.
        rows_per_shard: samples of each but the last.
        processes: how many write.
        bar: told of samples that are done.

    Returns:
        All new shards; how many keys were changed because a shard had them already.

    Raises:
        ShardError, IntegrityError: a sample cannot be read, or a tar not written.
    """
    shards = list(_plan(manifests, out, rows_per_shard))
    renamed = 0
    with closing(run(_write, shards, processes, out=out)) as results:
        for number, count in results:
            renamed += count
            bar.advance(shards[number].rows)
    return [shard_info(shard.tar) for shard in shards], renamed


def _plan(manifests: Sequence[Manifest], out: Path, rows_per_shard: int) -> Iterator[_NewShard]:
    """Cut the kept samples into shards of equal length."""
    pieces: list[_Piece] = []
    room, number = rows_per_shard, 0
    for base, info in ((manifest.folder, info) for manifest in manifests for info in manifest.shards):
        start = 0
        while start < info.rows:
            stop = min(info.rows, start + room)
            pieces.append(_Piece(base, info, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield _NewShard(out / f"shard-{number:06d}.tar", tuple(pieces))
                pieces, room, number = [], rows_per_shard, number + 1
    if pieces:
        yield _NewShard(out / f"shard-{number:06d}.tar", tuple(pieces))


def _write(shard: _NewShard) -> int:
    """Write and commit a shard, or leave one that is there; returns how many keys were changed."""
    keys = _unique_keys(shard)
    if not _is_there(shard):
        try:
            _commit(shard, keys)
        except OSError as e:
            raise ShardError(f"Writing {str(shard.tar)!r} failed: {e.strerror or e}. Mend that and repeat the command.") from e
    return sum(key is not None for key in keys)


def _commit(shard: _NewShard, keys: Sequence[str | None]) -> None:
    entries: list[IndexEntry] = []
    with temporary(shard.tar).open("wb") as file:
        stream = TarStream(file)
        for piece in shard.pieces:
            with ShardRows(piece.base, piece.info) as rows:
                for row in range(piece.start, piece.stop):
                    entries.append(_add(stream, rows, row, keys[len(entries)]))
        sha256 = stream.close()
    commit_file(temporary(shard.tar), shard.tar)
    write_index(sidecar_path(shard.tar), entries, tar_sha256=sha256)


def _add(stream: TarStream, rows: ShardRows, row: int, key: str | None) -> IndexEntry:
    sample = rows.read(row)
    parts = []
    for part in rows.parts(row):
        name = f"{key or sample.key}.{part['ext']}"
        try:
            offset = stream.add(name, sample.parts[part["ext"]])
        except ValueError as e:
            raise ShardError(f"{rows.name}:{sample.key}: {name!r} is too long for the name of a tar member: {e}.") from e
        parts.append(PartEntry(part["ext"], offset, part["size"], part["crc32c"]))
    described = (rows.table[name][row].as_py() for name in ("width", "height", "caption_length", "duration_s", "sample_rate", "frames"))
    return IndexEntry(key or sample.key, parts, *described)


def _unique_keys(shard: _NewShard) -> list[str | None]:
    """Return a new key for each sample whose own is taken by an earlier one of the shard, else None."""
    old: list[str] = []
    for piece in shard.pieces:
        with ShardRows(piece.base, piece.info) as rows:
            old += rows.keys[piece.start : piece.stop]
    taken, seen = set(old), set[str]()
    new: list[str | None] = []
    for key in old:
        if key in seen:
            fresh = next(name for number in itertools.count(2) if (name := f"{key}-{number}") not in taken)
            taken.add(fresh)
            new.append(fresh)
        else:
            seen.add(key)
            new.append(None)
    return new


def _is_there(shard: _NewShard) -> bool:
    if not shard.tar.exists() or not sidecar_path(shard.tar).exists():
        return False
    try:
        shard_info(shard.tar)
        return bool(read_index(sidecar_path(shard.tar)).num_rows == shard.rows)
    except ShardError:
        return False
