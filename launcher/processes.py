"""The processes below the launcher: none may outlive it.

DeepSpeed's launcher leaves its ranks running when it is killed itself. Here the launcher is their "child subreaper": a process whose
parent dies becomes the launcher's own child, however deep it was, so that it can be found, signalled and waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
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


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except (*GONE, OSError):
        return None
