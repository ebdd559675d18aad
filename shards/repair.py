"""Mend a data set: index again, fetch again, or leave damaged samples out by the row mask; each step is said.

A file that is replaced is committed by a rename, a sidecar after its tar, the manifest last: a repair that is killed is repeated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import trial
from shards.commit import commit_file, temporary
from shards.copies import Copies
from shards.digest import file_sha256
from shards.errors import IntegrityError, ShardError
from shards.index import adopt, index_tar, shard_info
from shards.manifest import MANIFEST_NAME, ORIGIN_NAME, SIDECAR_SUFFIX, Manifest, ShardInfo, read_manifest, sidecar_path, write_manifest
from shards.sidecar import IndexEntry, PartEntry, read_index, write_index
from shards.store import open_store
from shards.verify import Fault, strangers
from shards.versions.rows import ShardRows


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What was mended, and what could not be."""

    done: tuple[Fault, ...]
    """What was mended, and how."""
    failed: tuple[Fault, ...]
    """What is still wrong, and what would help."""
    rows: int
    """Samples of the data set now."""
    digest: str
    """Its version now."""
    was: str | None
    """Its version before; None if its manifest could not be read."""

    def __str__(self) -> str:
        """Give a line a step and a line of totals."""
        lines = [*(f"repaired  {fault}" for fault in self.done), *(f"FAILED    {fault}" for fault in self.failed)]
        version = f"version {self.digest[:12]}" + ("" if self.was in (None, self.digest) else f" (was {str(self.was)[:12]})")
        verdict = f"{len(self.done)} repaired, {len(self.failed)} could not be" if lines else "nothing was wrong"
        return "\n".join([*lines, f"{verdict}; {self.rows:,} samples, {version}"])


def repair(folder: str | Path, *, copies: str | None = None, progress: Callable[[int, int], None] | None = None) -> RepairReport:
    """Check a data set as `verify(full=True)` does, and mend what can be mended.

    A missing, damaged or foreign sidecar is made again. A missing or damaged tar is fetched from the copies if there are any; else its
    sound samples stay and the others go to the row mask, as do samples that do not decode and second samples of one key. The manifest
    is committed anew where that changes it.

    Args:
        folder: the data set.
        copies: folder or URL that holds copies of the tars.
        progress: called with (shards done, shards in all).

    Raises:
        ShardError: there is no data set, or none that can be made of what is there.
    """
    folder = Path(folder)
    source = None if copies is None else Copies(copies)
    done: list[Fault] = []
    manifest, was = _manifest(folder, source, done)
    failed: list[Fault] = []
    infos: list[ShardInfo] = []
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as threads:  # hashing and decoding release the interpreter's lock
        for number, mended in enumerate(threads.map(lambda info: _Shard(folder, info, source).mend(), manifest.shards), 1):
            infos.append(mended.info)
            done += mended.done
            failed += mended.failed
            if progress:
                progress(number, len(manifest.shards))
    done += _remove_leftovers(folder, manifest)
    failed += strangers(manifest, open_store(folder))
    if infos != list(manifest.shards):
        manifest = write_manifest(folder, infos)
    return RepairReport(done=tuple(done), failed=tuple(failed), rows=manifest.rows, digest=manifest.digest, was=was)


def _manifest(folder: Path, source: Copies | None, done: list[Fault]) -> tuple[Manifest, str | None]:
    """Read the manifest, or fetch it, or make it again from the sidecars."""
    try:
        manifest = read_manifest(folder, check_files=False)
        return manifest, manifest.digest
    except ShardError as e:
        if not folder.is_dir():
            raise
        problem = str(e)
    path = folder / MANIFEST_NAME
    if source is not None and source.fetch(MANIFEST_NAME, temporary(path)) is None:
        commit_file(temporary(path), path)
        done.append(Fault(MANIFEST_NAME, None, f"fetched again from {source.place}; it was missing, edited or damaged."))
        return read_manifest(folder, check_files=False), None
    if (folder / ORIGIN_NAME).exists():
        raise ShardError(
            f"{problem} Which samples this version leaves out is in its manifest alone: run the command again that {ORIGIN_NAME} names."
        )
    manifest = adopt(folder)
    done.append(Fault(MANIFEST_NAME, None, "made again from the sidecars; it was missing, edited or damaged."))
    return manifest, None


@dataclass(slots=True)
class _Shard:
    """One shard under repair."""

    folder: Path
    info: ShardInfo
    source: Copies | None
    done: list[Fault] = field(default_factory=list)
    failed: list[Fault] = field(default_factory=list)

    def mend(self) -> _Shard:
        """Do what can be done; `info` then says what the manifest is to hold."""
        try:
            self._mend()
        except OSError as e:
            self._fail(f"cannot be read or replaced: {e}.")
        return self

    @property
    def _tar(self) -> Path:
        return self.info.tar(self.folder)

    def _mend(self) -> None:
        digest = file_sha256(self._tar) if self._tar.is_file() else None
        if digest != self.info.sha256 and self._fetch_tar(missing=digest is None):
            digest = self.info.sha256
        if digest is None:
            self._fail("the tar is missing. Copy it here or give --from; or run `mmscale shards index` to go on without it.")
        elif self._sidecar_problem() is None and (digest == self.info.sha256 or self.info.location is None):
            self._check_rows(digest)
        elif self.info.location is not None:
            self._fail(f"it lies in another data set: run `mmscale shards verify {self._tar.parent} --full --repair` first.")
        elif digest == self.info.sha256:
            self._mend_sidecar()
            if not self.failed:
                self._check_rows(digest)
        elif self._made_for(digest):
            self._check_rows(digest)
        else:
            self._fail(
                "neither the tar nor its sidecar is the manifest's. Give --from, or run `mmscale shards index` to take the tar as it is."
            )

    def _fetch_tar(self, *, missing: bool) -> bool:
        if self.source is None or self.info.location is not None:
            return False
        target = temporary(self._tar)
        problem = self.source.fetch(self.info.shard, target)
        if problem is None and file_sha256(target) != self.info.sha256:
            problem = "the copy is not the manifest's tar either"
            target.unlink()
        if problem is not None:
            self._fail(f"the copy in {self.source.place} could not be used: {problem}.")
            return False
        commit_file(target, self._tar)
        self._say(f"fetched again from {self.source.place}; the tar was {'missing' if missing else 'damaged'}.")
        return True

    def _mend_sidecar(self) -> None:
        """Fetch or make the sidecar of a tar that is the manifest's."""
        path, problem = sidecar_path(self._tar), self._sidecar_problem()
        if self.source is not None and self.source.fetch(path.name, temporary(path)) is None:
            if file_sha256(temporary(path)) == self.info.index_sha256:
                commit_file(temporary(path), path)
                self._say(f"its sidecar was fetched again; {problem}.")
                return
            temporary(path).unlink()
        try:
            write_index(path, index_tar(self._tar), tar_sha256=self.info.sha256)
            self.info = shard_info(self._tar, mask=self.info.mask)
        except ShardError as e:
            self._fail(f"{problem}, and the tar cannot be indexed: {e}")
        else:
            self._say(f"indexed again; {problem}.")

    def _sidecar_problem(self) -> str | None:
        path = sidecar_path(self._tar)
        if not path.is_file():
            return "its sidecar was missing"
        if file_sha256(path) == self.info.index_sha256:
            return None
        return "its sidecar was damaged" if self._recorded() is None else "its sidecar was another than the manifest's"

    def _made_for(self, digest: str) -> bool:
        """Whether the sidecar is one that an interrupted repair, or an index, has made for the tar as it is."""
        return self._recorded() == digest

    def _recorded(self) -> str | None:
        try:
            return str(read_index(sidecar_path(self._tar)).schema.metadata[b"mmscale.tar_sha256"].decode())
        except ShardError:
            return None

    def _check_rows(self, digest: str, *, indexed: bool = False) -> None:
        """Leave out the samples that are not as they were written, and record the tar as it is now; `indexed`: the sidecar is new."""
        present = replace(self.info, index_sha256=file_sha256(sidecar_path(self._tar)))
        with ShardRows(self.folder, present) as rows:
            problems = list(_problems(rows))
            lost = [problem is not None for problem in problems]
            if digest != self.info.sha256 and all(lost) and lost:
                self._fail("no sample of the tar is as it was written. Give --from; or delete its sidecar and run `mmscale shards index`.")
                return
            if not indexed and digest == self.info.sha256 and any(problem and problem.startswith(_DIFFERS) for problem in problems):
                self._reindex_and_check(digest)
                return
            mask = rows.narrowed(~np.array(lost, dtype=np.bool_))
            for key, problem in zip(rows.keys, problems, strict=True):
                if problem is not None:
                    self.done.append(Fault(self.info.shard, key, f"left out: {problem}"))
        if digest != self.info.sha256:
            write_index(sidecar_path(self._tar), _entries(read_index(sidecar_path(self._tar))), tar_sha256=digest)
            self._say(f"the tar is damaged and there is no copy; {len(lost) - sum(lost)} of its {len(lost)} samples stay.")
        if digest != self.info.sha256 or any(lost):
            self.info = shard_info(self._tar, location=self.info.location, mask=mask)

    def _reindex_and_check(self, digest: str) -> None:
        """Make the sidecar again of a sound tar that it does not describe."""
        if self.info.location is not None:
            self._fail(f"its sidecar is of another tar: run `mmscale shards verify {self._tar.parent} --full --repair` first.")
            return
        try:
            write_index(sidecar_path(self._tar), index_tar(self._tar), tar_sha256=digest)
            self.info = shard_info(self._tar, mask=self.info.mask)
        except ShardError as e:
            self._fail(f"its sidecar is of another tar, and the tar cannot be indexed: {e}")
            return
        self._say("indexed again; its sidecar was of another tar.")
        self._check_rows(digest, indexed=True)

    def _say(self, step: str) -> None:
        self.done.append(Fault(self.info.shard, None, step))

    def _fail(self, problem: str) -> None:
        self.failed.append(Fault(self.info.shard, None, problem))


_DIFFERS = "its bytes differ"


def _problems(rows: ShardRows) -> Iterator[str | None]:
    """Yield what is wrong with each kept sample, None where nothing is."""
    seen: set[str] = set()
    for row, key in enumerate(rows.keys):
        if key in seen:
            yield "its key occurs before in the shard."
            continue
        seen.add(key)
        if not rows.is_named(row):
            yield f"{_DIFFERS} from what the sidecar says of them."
            continue
        try:
            sample = rows.read(row)
        except IntegrityError:
            yield f"{_DIFFERS} from their checksums."
        else:
            yield next(trial.problems(sample), None)


def _entries(table: pa.Table) -> list[IndexEntry]:
    return [IndexEntry(**{**row, "parts": [PartEntry(**part) for part in row["parts"]]}) for row in table.to_pylist()]


def _remove_leftovers(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Delete temporary files of killed commands, and sidecars whose tar is gone: they can be made again of nothing else."""
    for path in sorted(folder.glob(".*.tmp")):
        if path.is_file():
            path.unlink()
            yield Fault(path.name, None, "deleted: a killed command had left it.")
    known = set(manifest.table["shard"].to_pylist())
    for path in sorted(folder.glob(f"*{SIDECAR_SUFFIX}")):
        tar = path.name.removesuffix(SIDECAR_SUFFIX) + ".tar"
        if tar not in known and not (folder / tar).exists():
            path.unlink()
            yield Fault(path.name, None, "deleted: a sidecar without its tar.")
