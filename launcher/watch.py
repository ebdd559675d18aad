"""The launcher's connections to the ranks, on this machine and others: signals go out, ends and silence come in.

A process that is killed closes its connections whatever it was doing, so neither side can leave the other running without knowing.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.rank import WATCH

STOPPED = 85
"""Exit code of a rank that has ended on request."""
ASK_S = 1.0
"""Time between questions whether a rank's host is there."""


@dataclass(slots=True)
class Rank:
    """What is known of a rank."""

    rank: int
    host: str
    connection: socket.socket
    heard: float
    """When its host was last heard, on the monotonic clock."""
    code: int | None = None
    """How it ended: an exit code, or minus the signal; None while it runs."""
    ended_at: float | None = None
    """Seconds since the epoch, by its host's clock; without its own word, when the connection ended, by ours."""
    lost: bool = False
    """It went without a word."""
    buffer: bytes = b""


class Watch:
    """Listens for ranks and follows them until they end.

    Args:
        folder: the launch's log folder, where the ranks find out where to connect.
        address: of this machine, as the ranks' hosts reach it.
        silence_s: a host that says nothing for so long is lost.
        grace_s: what ranks get to end in when this process is gone.
    """

    def __init__(self, folder: Path, address: str, *, silence_s: float, grace_s: float) -> None:
        self.token, self.silence_s = secrets.token_hex(16), silence_s
        self.ranks: dict[int, Rank] = {}
        self._strangers: dict[int, tuple[socket.socket, bytes]] = {}
        self._asked = 0.0
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1" if address == "127.0.0.1" else "", 0), backlog=1024)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        where = {"address": address, "port": self._listener.getsockname()[1], "token": self.token}
        path = folder / WATCH
        path.touch(mode=0o600)
        # ranks are more patient: where both sides are merely slow, it is the launcher that decides, and can say what it saw
        path.write_text(json.dumps(where | {"silence_s": 2 * silence_s, "grace_s": grace_s}), encoding="utf-8")

    def look(self, timeout_s: float) -> None:
        """Wait for something to come, at most so long, and take it; ask every rank now and then whether it is there."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._selector.register(connection, selectors.EVENT_READ, None)
                self._strangers[connection.fileno()] = (connection, b"")
            elif isinstance(key.data, Rank):
                self._read(key.data)
            else:
                self._greet(key.fd)
        if time.monotonic() - self._asked > ASK_S:
            self._asked = time.monotonic()
            for rank in self.alive():
                self._tell(rank, {"alive": True})

    def alive(self) -> list[Rank]:
        """The ranks that have connected and not ended."""
        return [rank for rank in self.ranks.values() if rank.ended_at is None]

    def ended(self) -> dict[int, float]:
        """Rank -> when it ended, of those that have."""
        return {rank.rank: rank.ended_at for rank in self.ranks.values() if rank.ended_at is not None}

    def silent(self) -> list[Rank]:
        """The ranks whose host has said nothing for too long."""
        return [rank for rank in self.alive() if time.monotonic() - rank.heard > self.silence_s]

    def failed_s(self) -> float:
        """Seconds since the first rank failed; 0 while none has."""
        ends = [rank.heard for rank in self.ranks.values() if rank.ended_at is not None and (rank.lost or rank.code not in (0, STOPPED))]
        return time.monotonic() - min(ends) if ends else 0.0

    def send(self, number: signal.Signals) -> None:
        """Signal every rank that runs, all at once (DeepSpeed's launcher goes one by one, up to 30 s apart)."""
        for rank in self.alive():
            self._tell(rank, {"signal": int(number)})

    def close(self) -> None:
        """Close every connection: ranks that still run take this for the launcher's end."""
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _greet(self, descriptor: int) -> None:
        """Take the first line of a connection, which must prove that it is a rank's of this launch."""
        connection, buffer = self._strangers.pop(descriptor)
        content = _receive(connection)
        first, newline, rest = (buffer + content).partition(b"\n")
        if content and not newline and len(first) < 4096:
            self._strangers[descriptor] = (connection, first)
            return
        try:
            hello = json.loads(first)
            if not hmac.compare_digest(str(hello["token"]), self.token):
                raise ValueError("another launch's rank")
            rank = Rank(int(hello["rank"]), str(hello["host"]), connection, time.monotonic(), buffer=rest)
        except (ValueError, KeyError, TypeError):
            self._selector.unregister(connection)
            connection.close()
            return
        self._selector.modify(connection, selectors.EVENT_READ, rank)
        self.ranks[rank.rank] = rank

    def _read(self, rank: Rank) -> None:
        content = _receive(rank.connection)
        rank.heard = time.monotonic()
        *lines, rank.buffer = (rank.buffer + content).split(b"\n")
        for line in lines:
            word = json.loads(line)
            if "ended" in word:
                rank.code, rank.ended_at = word["ended"], word["time"]
        if not content:
            self._selector.unregister(rank.connection)
            rank.connection.close()
            if rank.ended_at is None:
                rank.ended_at, rank.lost = time.time(), True

    def _tell(self, rank: Rank, word: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # its end is found when it is read
            rank.connection.send(json.dumps(word).encode() + b"\n")


def own_address(host: str) -> str:
    """The address of this machine from which packets to a host leave.

    Raises:
        OSError: the host's name is not known.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname(host), 9))  # nothing is sent
        return str(probe.getsockname()[0])


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""
