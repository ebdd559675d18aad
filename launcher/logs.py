"""The ranks' output: the first rank's followed as it comes, any rank's last lines, and which rank failed first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

TRACEBACK = b"Traceback (most recent call last)"
TAIL_BYTES = 65536


@dataclass(slots=True)
class Follower:
    """Copies what is appended to files."""

    to: BinaryIO
    offsets: dict[Path, int] = field(default_factory=dict)

    def copy(self, paths: Sequence[Path]) -> None:
        """Copy what came since the last call."""
        for path in paths:
            with path.open("rb") as file:
                file.seek(self.offsets.get(path, 0))
                while chunk := file.read(1 << 20):
                    self.to.write(chunk)
                self.offsets[path] = file.tell()
        self.to.flush()


def tail(paths: Sequence[Path], lines: int = 20) -> list[str]:
    """The last lines of a rank's files, as text."""
    return [line for path in paths for line in _end(path).decode("utf-8", errors="replace").splitlines()[-lines:]]


def first_failure(ended: Sequence[int], last_alive: Mapping[int, float], logs: Mapping[int, Sequence[Path]]) -> int | None:
    """Tell which rank failed first, from the outside.

    A rank that raises prints a traceback, after which nothing comes: the time of its last output is when it failed, and its peers'
    tracebacks (a connection that closed) come later. A rank that was killed prints nothing: it failed after it was last seen alive.

    Args:
        ended: ranks that have ended.
        last_alive: rank -> when it was last seen alive, seconds since the epoch.
        logs: rank -> the files of its output.

    Returns:
        The rank, or None when none has ended.
    """

    def failed_at(rank: int) -> float:
        raised = [path.stat().st_mtime for path in logs.get(rank, ()) if TRACEBACK in _end(path)]
        return min([*raised, last_alive[rank]])

    return min(ended, key=failed_at, default=None)


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read()
