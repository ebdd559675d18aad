"""Which process made a file: a name that tells apart hosts, containers and processes, and whether that process has ended."""

from __future__ import annotations

import os
import re
import secrets
import socket
from pathlib import Path

_PATTERN = re.compile(r"(\w+)-(\d+)-([0-9a-f]{8})")
_RANDOM = secrets.token_hex(4)


def own_name() -> str:
    """Name this process: `HOST_NAMESPACE-PID-RANDOM`, of characters that are safe in a file name."""
    return f"{_machine()}-{os.getpid()}-{_RANDOM}"


def has_ended(name: str) -> bool:
    """Whether the process of that name is known to have ended: False for one on another machine, of which nothing is known."""
    match = _PATTERN.fullmatch(name)
    return match is not None and match[1] == _machine() and not _is_alive(int(match[2]))


def for_people(name: str) -> str:
    """Host and process of an owner, as an error says them."""
    match = _PATTERN.fullmatch(name)
    return f"process {match[2]} on {match[1].rpartition('_')[0]}" if match else "an unknown process"


def _machine() -> str:
    """Host and process namespace: containers of one host may share its name while a process number means another process in each."""
    host = re.sub(r"\W", "_", socket.gethostname())[:64] or "host"
    return f"{host}_{Path('/proc/self/ns/pid').stat().st_ino}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # ended just now, or hidden from other users
        return True
    return state != "Z"
