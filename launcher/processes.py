"""The processes below the launcher: none may outlive it.

DeepSpeed's launcher leaves its ranks running when it is killed itself. Here the launcher is their "child subreaper": a process whose
parent dies becomes the launcher's own child, however deep it was, so that it can be found, signalled and waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mmscale.errors import RunError

PR_SET_CHILD_SUBREAPER = 36
GONE = (psutil.NoSuchProcess, psutil.AccessDenied)


def become_subreaper() -> None:
    """Become the parent of every orphan among the descendants, until this process ends.

    Raises:
        RunError: the system does not know the call (it is Linux's, since 3.4).
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise RunError(f"This system does not let the launcher adopt orphaned processes (prctl: {os.strerror(ctypes.get_errno())}).")


def descendants() -> list[psutil.Process]:
    """Every live process below this one; those that have ended and wait to be collected are left out."""
    return [p for p in psutil.Process().children(recursive=True) if _is_alive(p)]


def kill_descendants(patience_s: float = 2.0) -> int:
    """End everything below this process: SIGTERM, then SIGKILL after `patience_s`, again until nothing is left.

    Returns:
        How many processes there were.
    """
    deadline = time.monotonic() + patience_s
    seen: set[int] = set()
    while living := descendants():
        late = time.monotonic() > deadline
        for process in living:
            if late or process.pid not in seen:
                send(process, signal.SIGKILL if late else signal.SIGTERM)
            seen.add(process.pid)
        time.sleep(0.05)
        reap()
    reap()
    return len(seen)


def reap(keep: int | None = None) -> None:
    """Collect the children that have ended, adopted ones among them; otherwise whoever waits for one to vanish waits in vain.

    DeepSpeed's launcher does, 30 s for each rank whose loader workers are ours by then. Asks the kernel for one that has ended, which is
    free; looking through all processes of a host every tenth of a second is not.

    Args:
        keep: a child that somebody else waits for; when it has ended, nothing more is collected.
    """
    with contextlib.suppress(ChildProcessError):  # there is no child at all
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and ended.si_pid != keep:
            os.waitpid(ended.si_pid, os.WNOHANG)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(*GONE):
        process.send_signal(number)


def processes_of_run(run: Path) -> Iterator[psutil.Process]:
    """Yield this machine's processes that `mmscale launch` started for a run folder, by their environment."""
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _variable(process, "MMSCALE_RUN") == str(run):
            yield process


@dataclass(slots=True)
class RankWatch:
    """The rank processes of this machine: found as they appear, watched until they end."""

    expected: int
    """How many there will be."""
    ranks: dict[int, psutil.Process] = field(default_factory=dict)
    """Rank -> its process, dead or alive."""
    last_alive: dict[int, float] = field(default_factory=dict)
    """Rank -> the last time it was seen alive, seconds since the epoch. A rank that ended did so after that."""
    handles: dict[int, int] = field(default_factory=dict)
    """Rank -> descriptor that becomes readable at its end, of those not seen to have ended."""

    def look(self) -> None:
        """Find ranks that have started and note which are alive."""
        if len(self.ranks) < self.expected:
            self._find()
        now = time.time()
        for rank in self.alive():
            self.last_alive[rank] = now

    def wait(self, timeout_s: float) -> None:
        """Wait, but wake at once when a rank ends: its launcher ends the peers within a tenth of a second, and then nobody can tell."""
        ends = select.poll()
        for descriptor in self.handles.values():
            ends.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in ends.poll(1000 * timeout_s)}
        now = time.time()
        for rank, descriptor in list(self.handles.items()):
            if descriptor in ended:
                os.close(self.handles.pop(rank))
            else:
                self.last_alive[rank] = now

    def close(self) -> None:
        """Close what is held open."""
        while self.handles:
            os.close(self.handles.popitem()[1])

    def alive(self) -> list[int]:
        """The ranks that run."""
        return [rank for rank, process in self.ranks.items() if _is_alive(process)]

    def ended(self) -> list[int]:
        """The ranks that were seen and have ended."""
        return sorted(set(self.ranks) - set(self.alive()))

    def send(self, number: signal.Signals) -> None:
        """Signal every rank that runs, all at once (DeepSpeed's launcher goes one by one, up to 30 s apart)."""
        for rank in self.alive():
            send(self.ranks[rank], number)

    def _find(self) -> None:
        """A rank is a process that has LOCAL_RANK and whose parent has not (a loader's worker has inherited it)."""
        processes = descendants()
        local = {p.pid for p in processes if _variable(p, "LOCAL_RANK") is not None}
        for process in processes:
            rank = _variable(process, "RANK")
            if process.pid in local and rank is not None and int(rank) not in self.ranks and _parent(process) not in local:
                self.ranks[int(rank)] = process
                with contextlib.suppress(ProcessLookupError):
                    self.handles[int(rank)] = os.pidfd_open(process.pid)


def wait_until_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for processes to end.

    Returns:
        Those that still run.
    """
    deadline = time.monotonic() + timeout_s
    living = list(processes)
    while (living := [p for p in living if _is_alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return living


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except GONE:
        return False


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except GONE:
        return None


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except (*GONE, OSError):
        return None
