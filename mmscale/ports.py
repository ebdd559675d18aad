"""A port for ranks to meet at."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 10_000
"""Below it lie the ports of many services."""
TRIES = 100


def free_port(local_range: Path = RANGE) -> int:
    """A TCP port that is free now, on every address.

    It lies outside of those that the kernel gives to connections by itself: until rank 0 listens seconds may pass, in which another
    process's connection would take one of these. Where they leave no port, it is one of them.

    Args:
        local_range: file with the first and the last port that the kernel gives.
    """
    try:
        first, last = map(int, local_range.read_text().split())
    except (OSError, ValueError):  # no Linux, or no /proc
        first, last = LOWEST, 65_535
    outside: list[int] = [*range(LOWEST, first), *range(max(LOWEST, last + 1), 65_536)]
    draw = random.SystemRandom()  # nobody's seed, so that two runs of one seed do not draw the same
    for port in draw.sample(outside, min(TRIES, len(outside))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
