"""From what nodes say of themselves to findings, each naming the node at fault and the fix. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmscale.finding import Finding, Level
from mmscale.nodes.facts import NodeFacts

GIB = 2**30
SHM = 256 * 2**20
SCRATCH = GIB
NOTHING = 32 * 2**20
"""Less than this is as good as nothing."""
OPEN_FILES = 4096
USED_MIB = 1024
"""A device that nobody uses holds some hundred MiB of the driver's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """What a rank said before the ranks were joined."""

    rank: int
    node: str
    device: str
    """cuda or cpu: what it would compute on."""
    devices: int
    """CUDA devices that it sees."""
    facts: NodeFacts | None
    """Of its node, from the first rank on it."""


def judge_nodes(reports: Sequence[RankReport], size: int, hosts: Sequence[str]) -> list[Finding]:
    """Judge what the ranks said.

    Args:
        reports: of those that came, in order.
        size: how many there should be.
        hosts: the node of each rank; empty where it is not known.
    """
    nodes = {report.node: report.facts for report in reports if report.facts is not None}
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _ranks(reports, size, hosts),
        lambda: _same(nodes),
        lambda: _room(nodes),
        lambda: _devices(reports),
        lambda: _gpus(nodes),
    )
    return [finding for check in checks for finding in check()]


def _ranks(reports: Sequence[RankReport], size: int, hosts: Sequence[str]) -> Iterator[Finding]:
    nodes = list(dict.fromkeys(report.node for report in reports))
    missing = sorted(set(range(size)) - {report.rank for report in reports})
    if not missing:
        yield Finding(check="ranks", level="pass", what=f"{size} ranks on {len(nodes)} nodes came: {_some(nodes)}")
        return
    fix = "Its output tells whether it was started and whether it reaches the first node's port; else leave the node out."
    lost = Counter(hosts[rank] if len(hosts) == size else f"rank {rank}" for rank in missing)
    for node, count in lost.items():
        named = node if len(hosts) == size else None
        what = f"{count} {'rank' if count == 1 else 'ranks'} of {node} did not come" if named else f"{node} did not come"
        yield Finding(check="ranks", level="fail", what=what, fix=fix, node=named)


def _same(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """Versions and code are what most nodes have (of as many each: what the first has)."""
    found: list[Finding] = []
    told = {node: {"Python": facts.python, **facts.versions} for node, facts in nodes.items()}
    for name in next(iter(told.values()), {}):
        usual = _most(versions[name] for versions in told.values())
        for node, versions in told.items():
            if versions[name] != usual:
                what = f"{node} has {name} {versions[name]}, the others {usual}"
                fix = "Install the same everywhere: constraints.txt holds the versions."
                found.append(Finding(check="versions", level="fail", what=what, fix=fix, node=node))
    usual = _most(facts.code for facts in nodes.values())
    for node, facts in nodes.items():
        if facts.code != usual:
            what = f"{node} has other sources of mmscale (digest {facts.code}) than the others ({usual})"
            fix = "Bring its checkout to the same commit, or install mmscale on a file system that all nodes share."
            found.append(Finding(check="code", level="fail", what=what, fix=fix, node=node))
    drivers = {node: facts.gpus[0].driver for node, facts in nodes.items() if facts.gpus}
    for node, driver in drivers.items():
        if driver != (usual := _most(drivers.values())):
            what = f"{node} has the NVIDIA driver {driver}, the others {usual}"
            found.append(Finding(check="driver", level="warn", what=what, fix="Install the same driver everywhere.", node=node))
    if not any(finding.level == "fail" for finding in found) and nodes:
        facts = next(iter(nodes.values()))
        some = ", ".join(f"{name} {facts.versions[name]}" for name in ("torch", "deepspeed", "mmscale"))
        yield Finding(check="versions", level="pass", what=f"Python {facts.python}, {some}, sources {facts.code} on every node")
    yield from found


def _room(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    found: list[Finding] = []
    for node, facts in nodes.items():
        if facts.unwritable is not None:
            fix = "Correct its permissions, its quota or its mount; all nodes share the run folder under one path."
            found.append(Finding(check="run_folder", level="fail", what=f"{node} cannot write: {facts.unwritable}", fix=fix, node=node))
        for path in facts.missing:
            fix = "Mount it there, or copy it: it has the same path on every node."
            found.append(Finding(check="paths", level="fail", what=f"{node} has no {path}", fix=fix, node=node))
        if facts.shm < SHM:
            what = f"{node} has {facts.shm / 2**20:.0f} MiB free in /dev/shm, which loader.workers and NCCL use"
            fix = "Delete what others left there, or make it larger (a container: --shm-size=8g, --ipc=host)."
            found.append(Finding(check="shm", level="fail" if facts.shm < NOTHING else "warn", what=what, fix=fix, node=node))
        if facts.scratch < SCRATCH:
            what = f"{node} has {facts.scratch / 2**20:.0f} MiB free for temporary files, where compiled code is kept"
            level: Level = "fail" if facts.scratch < NOTHING else "warn"
            found.append(Finding(check="scratch", level=level, what=what, fix="Free some space, or set TMPDIR.", node=node))
        if facts.open_files < OPEN_FILES:
            what = f"a process on {node} may open {facts.open_files} files"
            fix = "Raise it to 65536 (ulimit -n, /etc/security/limits.conf)."
            found.append(Finding(check="limits", level="warn", what=what, fix=fix, node=node))
    if not found and nodes:
        shm, scratch = (min(getattr(facts, name) for facts in nodes.values()) / GIB for name in ("shm", "scratch"))
        what = f"at least {shm:,.1f} GiB in /dev/shm, {scratch:,.1f} GiB for temporary files; the run folder can be written to"
        yield Finding(check="room", level="pass", what=what)
    yield from found


def _devices(reports: Sequence[RankReport]) -> Iterator[Finding]:
    """Every rank computes on the same kind of device, and none shares its own."""
    usual = _most(report.device for report in reports)
    for node in dict.fromkeys(report.node for report in reports):
        here = [report for report in reports if report.node == node]
        if odd := [report for report in here if report.device != usual]:
            what = f"{len(odd)} of {len(here)} ranks of {node} would compute on {odd[0].device}, the others on {usual}"
            fix = "Look at its driver (nvidia-smi, dmesg) and at CUDA_VISIBLE_DEVICES there, or leave the node out."
            yield Finding(check="devices", level="fail", what=what, fix=fix, node=node)
        elif usual == "cuda" and 1 < here[0].devices < len(here):
            what = f"{node} has {here[0].devices} devices for {len(here)} ranks"
            fix = "Give it as many ranks as devices; a device that is missing has fallen off the bus: leave the node out."
            yield Finding(check="devices", level="fail", what=what, fix=fix, node=node)


def _gpus(nodes: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    seen = {node: facts for node, facts in nodes.items() if facts.gpus}
    if not seen:
        reasons = sorted({facts.no_gpus for facts in nodes.values()})
        yield Finding(check="gpus", level="skip", what="; ".join(reasons) or "no node told of any")
        return
    usual, found = _most(str(len(facts.gpus)) for facts in nodes.values()), list[Finding]()
    for node, facts in nodes.items():
        if str(len(facts.gpus)) != usual:
            what = f"{node} shows {len(facts.gpus)} devices, the others {usual}{f': {facts.no_gpus}' if facts.no_gpus else ''}"
            fix = "Look at its driver (nvidia-smi, dmesg); leave the node out."
            found.append(Finding(check="gpus", level="fail", what=what, fix=fix, node=node))
        for gpu in facts.gpus:
            if gpu.uncorrected or gpu.retiring:
                what = f"GPU {gpu.index} of {node} has {gpu.uncorrected or 0} memory errors that ECC could not correct"
                what += ", and memory that waits to be retired" if gpu.retiring else ""
                fix = "Leave the node out; reset the device, and have it replaced if errors come again."
                found.append(Finding(check="gpus", level="fail", what=what, fix=fix, node=node))
            if gpu.used_mib > USED_MIB:
                what = f"{gpu.used_mib:,} MiB of GPU {gpu.index} of {node} are in use before the run has begun"
                fix = "End what uses it (nvidia-smi names it), or leave the node out."
                found.append(Finding(check="gpus", level="fail", what=what, fix=fix, node=node))
    if not found:
        names = sorted({gpu.name for facts in seen.values() for gpu in facts.gpus})
        yield Finding(check="gpus", level="pass", what=f"{usual} x {', '.join(names)} a node: no memory errors, nobody else's memory")
    yield from found


def _most(values: Iterable[str]) -> str:
    """The most frequent one; of several, the first."""
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"
