"""What nodes must reach. No torch here: a cluster file holds these keys (`checks`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from shards.configfile import need

UNFIT = 88
"""Exit code of ranks whose nodes failed their check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLimits:
    """Limits that depend on the cluster; the others are constants of `mmscale.nodes.judge`."""

    all_reduce_gb_s: float | None = None
    """Least bus bandwidth of an all-reduce over all ranks, GB/s as nccl-tests counts it; null: measured and told, not judged."""
    read_mb_s: float | None = None
    """Least rate at which each node reads shards while all of them do, MB/s; null: what the steps need, where that is known."""
    clock_s: float = 2.0
    """Most seconds between the clocks of two nodes."""
    patience_s: float = 120.0
    """Longest wait for all ranks to come, and then for each measurement."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one that is not positive.
        """
        for field in fields(NodeLimits):
            value = getattr(self, field.name)
            need(value is None or value > 0, f"`checks.{field.name}` of the cluster must be above 0; got {value}.")

    def options(self) -> list[str]:
        """As words of the command line, those alone that differ from the defaults."""
        given = [(field.name, getattr(self, field.name)) for field in fields(NodeLimits) if getattr(self, field.name) != field.default]
        return [word for name, value in given for word in (_option(name), f"{value:g}")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The command line of `python -m mmscale.nodes`."""

    limits: NodeLimits
    hosts: tuple[str, ...]
    """The node of each rank, where whoever starts the ranks knows it: it names ranks that never came."""
    words: tuple[str, ...]
    """CONFIG [key=value ...], as `mmscale.train` takes them."""


def parse(argv: Sequence[str]) -> Asked:
    """Read options, then the words of the stage."""
    parser = argparse.ArgumentParser(prog="python -m mmscale.nodes", description="Look at the nodes of a run before it starts.")
    for field in fields(NodeLimits):
        parser.add_argument(_option(field.name), type=float, default=field.default)
    parser.add_argument("--hosts", default="", metavar="HOST:RANKS,...", help="the nodes in the order of the ranks")
    parser.add_argument("words", nargs="+", metavar="CONFIG [KEY=VALUE]...")
    given = parser.parse_args([word for word in argv if not word.startswith("--local_rank")])
    limits = NodeLimits(**{field.name: getattr(given, field.name) for field in fields(NodeLimits)})
    limits.check()
    hosts = [word.rpartition(":") for word in given.hosts.split(",") if word]
    return Asked(limits=limits, hosts=tuple(host for host, _, ranks in hosts for _ in range(int(ranks))), words=tuple(given.words))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
