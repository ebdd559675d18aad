"""Copies of committed checkpoints in an object store: `checkpoint.copy_to`/step-00000500.1a2b3c4d5e6f/..., the manifest last.

Without its manifest nothing there is a copy. The digits are the manifest's hash: a copy that was cut short is gone on with by the next
attempt at the very same checkpoint, and what lies there of two checkpoints of one step never mixes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mmscale.checkpoint import manifest
from mmscale.checkpoint.retention import PINNED
from mmscale.errors import CheckpointError
from shards.store.bucket import Bucket
from shards.store.config import StoreConfig

_OBJECT = re.compile(r"(step-(\d{8,})\.([0-9a-f]{12}))/(.+)")
BAD = "BAD"
"""Object in place of the manifest of a copy that was found damaged, with what was wrong."""
ROUNDS = 2
"""How often what is missing is sent, before a copy is given up."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What lies in the store of one checkpoint."""

    name: str
    step: int
    digits: str
    """The first 12 of the manifest's sha256."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Path in the checkpoint to bytes there."""

    @property
    def is_whole(self) -> bool:
        """Whether its manifest is there, which was sent last."""
        return manifest.NAME in self.sizes

    @property
    def is_pinned(self) -> bool:
        """Whether it is kept for good."""
        return PINNED in self.sizes

    def object(self, path: str) -> str:
        """Name of a file's object below the root."""
        return f"{self.name}/{path}"


class Copies:
    """The copies of one run.

    Args:
        url: where they are, of this run alone.
        store: how requests are made.
    """

    def __init__(self, url: str, store: StoreConfig) -> None:
        self._bucket = Bucket(url, store)
        self.root = self._bucket.root

    def found(self, prefix: str = "") -> list[Copy]:
        """List what there is, whole or not, by step; what is not named like a copy is passed over."""
        copies: dict[str, Copy] = {}
        for name, size in self._bucket.sizes(prefix).items():
            match = _OBJECT.fullmatch(name)
            if match is not None:
                copy = copies.setdefault(match[1], Copy(match[1], int(match[2]), match[3]))
                copy.sizes[match[4]] = size
        return sorted(copies.values(), key=lambda c: (c.step, c.name))

    def write(self, folder: Path) -> tuple[Copy, int]:
        """Copy a committed checkpoint; what an earlier attempt has sent stays.

        Returns:
            The copy, and the bytes that were sent.

        Raises:
            CheckpointError: the store does not keep what it is sent.
            OSError: a file is gone, as the checkpoint has been deleted meanwhile.
            ShardError: the store refuses, or failed too often.
        """
        text = (folder / manifest.NAME).read_bytes()
        entries = manifest.read_manifest(folder)
        name = f"{folder.name}.{hashlib.sha256(text).hexdigest()[:12]}"
        copy = self._look(name)
        if copy.is_whole and not _lacks(copy, entries):
            return copy, 0
        self._bucket.delete([copy.object(path) for path in (manifest.NAME, BAD) if path in copy.sizes])  # it is not what it says
        if BAD in copy.sizes:
            copy.sizes.clear()
        sent = 0
        for _ in range(ROUNDS):
            for entry in _lacks(copy, entries):
                self._bucket.put(copy.object(entry.path), folder / entry.path)
                sent += entry.size
            copy = self._look(name)
            if not (lacks := _lacks(copy, entries)):
                self._bucket.put(copy.object(manifest.NAME), text)
                return copy, sent
        raise CheckpointError(
            f"The copy {self.root}/{name} was given up: {lacks[0].path} has {copy.sizes.get(lacks[0].path, 0)} bytes there and "
            f"{lacks[0].size} here, though it was sent {ROUNDS} times. Check the store."
        )

    def retain(self, newest: Copy, kept: Collection[int], pinned: dict[int, bool]) -> list[str]:
        """Delete copies that are not kept, and what is left of unfinished ones: the manifest first.

        Args:
            newest: the copy that was written last; others of its step go.
            kept: steps that stay.
            pinned: step -> whether it is pinned in the run folder, of those that are there.

        Returns:
            The names of what was deleted.
        """
        deleted = []
        for copy in self.found():
            if copy.name != newest.name and (not copy.is_whole or copy.step not in kept or copy.step == newest.step):
                self._bucket.delete([copy.object(manifest.NAME)] if copy.is_whole else [])
                self._bucket.delete([copy.object(path) for path in copy.sizes if path != manifest.NAME])
                deleted.append(copy.name)
            elif copy.step in pinned and pinned[copy.step] != copy.is_pinned:
                if copy.is_pinned:
                    self._bucket.delete([copy.object(PINNED)])
                else:
                    self._bucket.put(copy.object(PINNED), b"")
        return deleted

    def set_aside(self, copy: Copy, fault: str) -> None:
        """Take a damaged copy out of those that are whole. The next retention deletes it."""
        self._bucket.put(copy.object(BAD), fault.encode())
        self._bucket.delete([copy.object(manifest.NAME)])

    def manifest_of(self, copy: Copy) -> tuple[str, list[manifest.FileEntry]]:
        """Read the manifest of a whole copy.

        Returns:
            Its text, and what it lists.

        Raises:
            CheckpointError: it is not the one that the copy is named after, or it is gone.
            ShardError: the store refuses, or failed too often.
        """
        try:
            text = self._bucket.read(copy.object(manifest.NAME))
        except FileNotFoundError as e:
            raise CheckpointError(f"{manifest.NAME} is missing") from e
        if hashlib.sha256(text).hexdigest()[:12] != copy.digits:
            raise CheckpointError(f"{manifest.NAME} does not match the copy's name")
        return text.decode(), manifest.parse(text, f"{self.root}/{copy.name}")

    def fetch(self, copy: Copy, entries: Iterable[manifest.FileEntry], folder: Path) -> str | None:
        """Fetch files of a copy into a folder and compare them; one sentence that names the first that differs, or None.

        Raises:
            ShardError: the store refuses, or failed too often.
        """
        for entry in entries:
            if (fault := manifest.find_misplaced(entry)) is not None:
                return fault
            path = folder / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                digest = self._bucket.fetch(copy.object(entry.path), entry.size, path)
            except FileNotFoundError:
                return f"{entry.path} is missing"
            if path.stat().st_size != entry.size:
                return f"{entry.path} has {path.stat().st_size} bytes instead of {entry.size}"
            if digest != entry.sha256:
                return f"{entry.path} does not match its sha256"
        return None

    def _look(self, name: str) -> Copy:
        """What is there of one copy."""
        step, digits = _OBJECT.fullmatch(f"{name}/x").group(2, 3)  # type: ignore[union-attr]
        return next(iter(self.found(name)), Copy(name, int(step), digits))


def _lacks(copy: Copy, entries: Iterable[manifest.FileEntry]) -> list[manifest.FileEntry]:
    return [e for e in entries if copy.sizes.get(e.path) != e.size]
