"""From what was measured to findings. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mmscale.finding import Finding, Level
from mmscale.nodes.limits import NodeLimits
from mmscale.nodes.measure import slow_nodes

MB = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Figures of the nodes that were measured together."""

    ranks: int
    nodes: tuple[str, ...]
    clocks: Mapping[str, float] = field(default_factory=dict)
    """Node -> seconds that its clock is ahead of the first node's."""
    all_reduce_gb_s: float | None = None
    """Bus bandwidth; None on one rank."""
    exchanges_gb_s: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Pair of nodes (by number) -> its rate each way."""
    reads_mb_s: Mapping[str, float] = field(default_factory=dict)
    """Node -> its rate of reading shards while the others read too."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Node -> why it could read none."""
    needed_mb_s: float | None = None
    """What a node reads in training; None where it is not known."""
    needed_from: str = ""
    """Where that is from."""


def judge_measured(found: Measured, limits: NodeLimits) -> list[Finding]:
    """Judge clocks, bandwidth and storage."""
    return [*_clocks(found, limits), *_bandwidth(found, limits), *_storage(found, limits)]


def _clocks(found: Measured, limits: NodeLimits) -> Iterator[Finding]:
    if len(found.nodes) < 2:
        return
    fix = "Set it by NTP (chronyc makestep): logs, time-outs and leases of files go by it."
    spread = max(found.clocks.values()) - min(found.clocks.values())
    if len(found.nodes) == 2 and spread > limits.clock_s:
        yield Finding(check="clocks", level="fail", what=f"the clocks of {' and '.join(found.nodes)} are {spread:.1f} s apart", fix=fix)
        return
    usual = sorted(found.clocks.values())[(len(found.clocks) - 1) // 2]
    off = {node: ahead - usual for node, ahead in found.clocks.items() if abs(ahead - usual) > limits.clock_s}
    for node, ahead in off.items():
        what = f"the clock of {node} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the others'"
        yield Finding(check="clocks", level="fail", what=what, fix=fix, node=node)
    if not off:
        yield Finding(check="clocks", level="pass", what=f"at most {spread * 1e3:,.0f} ms apart")


def _bandwidth(found: Measured, limits: NodeLimits) -> Iterator[Finding]:
    if found.all_reduce_gb_s is None:
        yield Finding(check="all_reduce", level="skip", what="there is one rank")
        return
    slow, floor = slow_nodes(found.nodes, found.exchanges_gb_s), limits.all_reduce_gb_s
    rate = f"{found.all_reduce_gb_s:.3g} GB/s bus bandwidth over {found.ranks} ranks"
    fix = "Look at its links (ibstat, ethtool, nvidia-smi topo -m) and at NCCL_SOCKET_IFNAME and NCCL_IB_HCA, or leave the node out."
    for node, a_node in slow.items():
        others = sorted(found.exchanges_gb_s.values())[-1]
        what = f"{node} exchanges {a_node:.3g} GB/s with its neighbours, others up to {others:.3g}"
        level: Level = "warn" if floor is None or found.all_reduce_gb_s >= floor else "fail"
        yield Finding(check="exchange", level=level, what=what, fix=fix, node=node)
    if floor is None or found.all_reduce_gb_s >= floor:
        yield Finding(check="all_reduce", level="pass", what=rate + ("" if floor is None else f", of at least {floor:g}"))
    else:
        fix = (
            "See the slow node." if slow else "No node stands out: look at the network between them, NCCL_DEBUG=INFO tells what NCCL uses."
        )
        yield Finding(check="all_reduce", level="fail", what=f"{rate}, less than checks.all_reduce_gb_s = {floor:g}", fix=fix)


def _storage(found: Measured, limits: NodeLimits) -> Iterator[Finding]:
    for node, why in found.unread.items():
        fix = "Give the node access to the shards (mount, route, credentials), or leave it out."
        yield Finding(check="storage", level="fail", what=f"{node} cannot read shards: {why}", fix=fix, node=node)
    if not found.reads_mb_s:
        return
    given = limits.read_mb_s is not None
    least = limits.read_mb_s if limits.read_mb_s is not None else found.needed_mb_s
    why = "checks.read_mb_s asks for" if given else f"a node needs {found.needed_from}"
    slow = {node: rate for node, rate in found.reads_mb_s.items() if least is not None and rate < least}
    for node, rate in slow.items():
        what = f"{node} reads {rate:,.1f} MB/s while all read, less than the {least:,.1f} that {why}"
        fix = "Move the shards to faster storage, set store.cache to a local disk, or see what else is using the storage."
        alone = node if len(slow) < len(found.reads_mb_s) else None
        yield Finding(check="storage", level="fail" if given else "warn", what=what, fix=fix, node=alone)
    if not slow:
        what = f"every node reads at least {min(found.reads_mb_s.values()):,.0f} MB/s while all read"
        yield Finding(check="storage", level="pass", what=what + ("" if least is None else f"; {why} {least:,.3g}"))
