"""Which hosts and slots of a hostfile are used. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from launcher.cluster import ClusterConfig
from shards.errors import ConfigError

Slots: TypeAlias = tuple[int, ...]
"""Indexes of a host's devices; each is given a rank."""


def choose_hosts(listed: Mapping[str, int], cluster: ClusterConfig) -> tuple[tuple[str, Slots], ...]:
    """Apply include, exclude, the number of nodes and the ranks a node to a hostfile.

    Args:
        listed: host -> slots, in order.
        cluster: holds what is to be applied.

    Raises:
        ConfigError: a host or a slot that is not listed, or more of them than there are.
    """
    hosts = {host: tuple(range(slots)) for host, slots in listed.items()}
    if cluster.hosts.include is not None:
        wanted = _parse("include", cluster.hosts.include, hosts)
        hosts = {host: wanted[host] for host in hosts if host in wanted}
    elif cluster.hosts.exclude is not None:
        left_out = _parse("exclude", cluster.hosts.exclude, hosts)
        hosts = {host: tuple(slot for slot in slots if slot not in left_out.get(host, ())) for host, slots in hosts.items()}
        hosts = {host: slots for host, slots in hosts.items() if slots}
        if not hosts:
            raise ConfigError(f"`hosts.exclude` = {cluster.hosts.exclude!r} leaves no host of {cluster.hosts.hostfile}.")
    nodes = cluster.nodes or len(hosts)
    if nodes > len(hosts):
        raise ConfigError(f"`--nodes` must be between 1 and the {len(hosts)} hosts of {cluster.hosts.hostfile}; got {nodes}.")
    ranks = cluster.ranks_per_node
    chosen = list(hosts.items())[:nodes]
    for host, slots in chosen:
        if ranks is not None and ranks > len(slots):
            raise ConfigError(
                f"`--ranks-per-node {ranks}` is more than the {len(slots)} slots of the host {host!r} in {cluster.hosts.hostfile}."
            )
    return tuple((host, slots[:ranks]) for host, slots in chosen)


def read_hostfile(path: Path) -> dict[str, int]:
    """Read `HOST slots=N` lines, in order. DeepSpeed would go on with this machine alone where the file is missing.

    Raises:
        ConfigError: no such file, a line of another form, a host twice, or no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"The hostfile {str(path)!r} cannot be read: {e}. Give the path of a file of `HOST slots=N` lines.") from e
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) == 0 or not words[-1].startswith("slots="):
            raise ConfigError(f"{path}:{number}: {line.strip()!r} is not of the form `HOST slots=N`, such as `node-1 slots=8`.")
        if words[0] in hosts:
            raise ConfigError(f"{path}:{number}: the host {words[0]!r} is listed twice. Give it one line with all its slots.")
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ConfigError(f"The hostfile {str(path)!r} lists no host. Give it `HOST slots=N` lines, such as `node-1 slots=8`.")
    return hosts


def _parse(key: str, text: str, hosts: Mapping[str, Slots]) -> dict[str, Slots]:
    """Read `HOST@HOST:0,2`; a host without slots stands for all of its."""
    found: dict[str, Slots] = {}
    for word in text.split("@"):
        host, colon, slots = word.strip().partition(":")
        if host not in hosts:
            raise ConfigError(f"`hosts.{key}` = {text!r} names {host!r}, which the hostfile does not list: it lists {', '.join(hosts)}.")
        if colon and not all(slot.isdigit() and int(slot) in hosts[host] for slot in slots.split(",")):
            raise ConfigError(f"`hosts.{key}` = {text!r}: the slots of {host!r} are 0 to {len(hosts[host]) - 1}; got {slots!r}.")
        named = {int(slot) for slot in slots.split(",")} if colon else set(hosts[host])
        found[host] = tuple(sorted(named | set(found.get(host, ()))))
    return found
