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
        """Copy what came since the last call; a file that is not there yet is left for later."""
        for path in paths:
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self.offsets.get(path, 0))
                while chunk := file.read(1 << 20):
                    self.to.write(chunk)
                self.offsets[path] = file.tell()
        self.to.flush()


@dataclass(slots=True)
class LineFollower:
    """The whole lines that are appended to a file."""

    path: Path
    start: int = 0
    """Where to begin, in bytes."""
    rest: bytes = b""

    def lines(self) -> list[str]:
        """Those that came since the last call."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = file.read()
        self.start += len(content)
        *whole, self.rest = (self.rest + content).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in whole]


def tail(path: Path, lines: int = 20) -> list[str]:
    """The last lines of a rank's output, as text; none where there is no file."""
    return _end(path).decode("utf-8", errors="replace").splitlines()[-lines:]


def last_words(path: Path, lines: int = 20) -> list[str]:
    """What tells why a rank failed: its first traceback, where there is one, else its last lines."""
    end = _end(path)
    begin = end.find(TRACEBACK)
    if begin < 0:
        return tail(path, lines)
    words = end[begin:].decode("utf-8", errors="replace").splitlines()
    return words[: 2 * lines] if len(words) <= 2 * lines else [*words[:lines], "...", *words[-lines:]]


def first_failure(ended: Mapping[int, float], logs: Mapping[int, Path]) -> int | None:
    """Tell which rank failed first, from the outside.

    A rank that raises prints a traceback, after which nothing comes: the time of its last output is when it failed, and its peers'
    tracebacks (a connection that closed) come later. A rank that was killed prints nothing: then its end counts.

    Args:
        ended: rank -> when it was seen to end, seconds since the epoch.
        logs: rank -> its output.

    Returns:
        The rank, or None when none has ended or failed.
    """

    def failed_at(rank: int) -> float:
        raised = [path.stat().st_mtime for path in (logs.get(rank),) if path is not None and TRACEBACK in _end(path)]
        return min([*raised, *([ended[rank]] if rank in ended else [])])

    failed = [rank for rank, path in logs.items() if rank in ended or TRACEBACK in _end(path)]
    return min({*failed, *ended}, key=failed_at, default=None)


def _end(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""
