"""Claims on shards, so that commands on several hosts that share nothing but a folder do not write the same ones at the same time.

A claim is a small file with its holder's name, linked into place, which succeeds for one process only, on NFS too. Its holder touches it
again and again; one that is not touched any more, or whose process has ended on this machine, may be taken over. Claims save work, they
protect nothing: whoever writes a shard, its bytes are the same and it is renamed into place as a whole, so two holders do no harm.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from shards.commit import commit_first
from shards.owner import for_people, has_ended, own_name

CLAIM_FOLDER = ".claims"
ABANDONED_AFTER_S = 60.0
"""Age of the last touch from which a claim is taken for abandoned; by the clock of the file system, not of the hosts."""
_TOUCHES = 6


class Claims:
    """The claims that this command holds in one output folder; leaving the context gives up all of them."""

    def __init__(self, out: Path, *, abandoned_after_s: float = ABANDONED_AFTER_S) -> None:
        self._folder = out / CLAIM_FOLDER
        self._owner = own_name()
        self._abandoned_after_s = abandoned_after_s
        self._held: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_touching, daemon=True)

    def __enter__(self) -> Claims:
        self._folder.mkdir(exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        self._clock().unlink(missing_ok=True)
        with suppress(OSError):  # others still hold claims there
            self._folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a name; False if another process holds it."""
        if self._create(name) or (self._is_abandoned(name) and self._seize(name)):
            self._held.add(name)
            return True
        return False

    def release(self, name: str) -> None:
        """Give a claim back."""
        self._held.discard(name)
        if self._holder(name) == self._owner:
            (self._folder / name).unlink(missing_ok=True)

    def clear(self, name: str) -> None:
        """Delete what all others have left behind, for a holder of `name` that knows that nothing else is to be claimed any more."""
        for entry in os.scandir(self._folder):
            if entry.name not in (name, self._clock().name):
                Path(entry.path).unlink(missing_ok=True)

    def holder_of(self, name: str) -> str:
        """Who holds a claim, for people."""
        return for_people(self._holder(name) or "")

    def _create(self, name: str) -> bool:
        try:
            self._folder.mkdir(exist_ok=True)  # whoever ended last has taken it away
            return commit_first(self._folder / name, self._owner.encode())
        except FileNotFoundError:  # and again just now
            return False

    def _holder(self, name: str) -> str | None:
        """Owner in the claim's file; None if there is none."""
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _is_abandoned(self, name: str) -> bool:
        try:
            touched = (self._folder / name).stat().st_mtime
            return has_ended(self._holder(name) or "") or self._now() - touched > self._abandoned_after_s
        except FileNotFoundError:  # given up, or cleared, in this moment
            return False

    def _seize(self, name: str) -> bool:
        """Move an abandoned claim away, which only one process can, and make a new one.

        A claim that another process has renewed since it was judged is put back.
        """
        judged = self._holder(name)
        grave = self._folder / f".{name}.{self._owner}"
        try:
            (self._folder / name).rename(grave)
            if grave.read_text(encoding="utf-8") != judged:
                grave.rename(self._folder / name)
                return False
            grave.unlink()
        except FileNotFoundError:  # another process was first, or has cleared the folder
            return False
        return self._create(name)

    def _now(self) -> float:
        clock = self._clock()
        self._folder.mkdir(exist_ok=True)
        clock.touch()
        return clock.stat().st_mtime

    def _clock(self) -> Path:
        return self._folder / f".clock.{self._owner}"

    def _keep_touching(self) -> None:
        while not self._ended.wait(self._abandoned_after_s / _TOUCHES):
            for name in list(self._held):
                with suppress(OSError):  # taken over after a pause of this process, or a moment's fault of the share: the next touch tells
                    os.utime(self._folder / name)
