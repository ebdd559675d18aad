"""The check, as each rank goes through it: say what the node is, be judged together, then measure together.

What a rank says goes through the rendezvous store, which needs no process group: a node that is broken is named by what it says, and
one that is missing by its silence. Only ranks of good nodes are joined, as joining is where bad ones hang.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mmscale.config import RunConfig
from mmscale.data_config import training_places
from mmscale.finding import Finding, failed_nodes, render
from mmscale.nodes import measure, reading
from mmscale.nodes.facts import NodeFacts, look, node_name
from mmscale.nodes.judge import RankReport, judge_nodes
from mmscale.nodes.limits import UNFIT, Asked
from mmscale.nodes.verdict import Measured, judge_measured
from mmscale.run_folder import RunFolder, replace_file
from mmscale.world import World, fill_environment
from shards.errors import MmscaleError
from shards.store.place import is_url

MARGIN = 0.1
"""The first rank waits longer than the others by this part, so that those it misses have said why."""
LEAVE_S = 10.0
"""Longest wait of the first rank for the others to have read what they are to do."""


class Check:
    """One check of the nodes of a run.

    Args:
        asked: the command line.
        config: the stage that it names.
        world: who this rank is.
    """

    def __init__(self, asked: Asked, config: RunConfig, world: World) -> None:
        self.asked, self.config, self.world = asked, config, world
        self.patience = timedelta(seconds=asked.limits.patience_s)
        self.reports: list[RankReport] = []
        """What the ranks said, in order (first rank)."""
        self.judged: list[Finding] = []
        """What followed from it (first rank)."""

    def run(self) -> int:
        """Go through it.

        Returns:
            0, or UNFIT: a node failed, and RUN/nodes.json names it.
        """
        try:
            store = self._meet()
        except (dist.DistNetworkError, dist.DistStoreError) as e:
            return self._say_unreachable(e)
        try:
            store.set(f"rank/{self.world.rank}", json.dumps(asdict(self._report())))
            if self.world.is_first:
                self._collect(store)
            return self._part(store, self._together(store) if store.get("joined") == b"yes" else UNFIT)
        except (RuntimeError, MmscaleError) as e:  # what torch's stores and back ends raise when a peer is gone or does not answer
            return self._say_broken(e)

    def _together(self, store: Store) -> int:
        """Join the ranks and measure; the exit code that all of them end with."""
        measured = self._measure(store, [list(ranks) for ranks in json.loads(store.get("nodes"))])
        if self.world.is_first:
            code = self._conclude([*self.judged, *judge_measured(measured, self.asked.limits)], measured)
            store.set("verdict", str(code))
        return int(store.get("verdict"))

    def _meet(self) -> Store:
        """Connect to the rendezvous store; the first rank serves it, unless torchrun does."""
        fill_environment(self.world)
        is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.world.size,
            is_master=self.world.is_first and not is_served,
            timeout=self.patience,
            wait_for_workers=False,
        )
        store.set_timeout(4 * self.patience)  # of what others wait for while the first rank waits
        return PrefixStore(f"nodes/{os.environ.get('MMSCALE_LAUNCH_ID', '')}", store)

    def _report(self) -> RankReport:
        paths = [Path(place) for place in training_places(self.config.data) if not is_url(place)]
        is_leader = self.world.local_rank == 0
        return RankReport(
            rank=self.world.rank,
            node=node_name(),
            device=self.world.device.type,
            devices=torch.cuda.device_count() if self.world.device.type == "cuda" else 0,
            facts=look(Path(self.config.run), paths) if is_leader else None,
        )

    def _collect(self, store: Store) -> None:
        """Wait for all ranks, judge what they said, and let them go on or not (first rank)."""
        deadline, waiting = time.monotonic() + (1 + MARGIN) * self.asked.limits.patience_s, set(range(self.world.size))
        while waiting and time.monotonic() < deadline:
            came = {rank for rank in waiting if store.check([f"rank/{rank}"])}
            self.reports += [_read(store.get(f"rank/{rank}")) for rank in sorted(came)]
            waiting -= came
            time.sleep(0.05 if waiting else 0)
        self.reports.sort(key=lambda report: report.rank)
        self.judged = judge_nodes(self.reports, self.world.size, self.asked.hosts)
        if any(finding.level == "fail" for finding in self.judged):
            self._conclude(self.judged, None)
            store.set("joined", "no")
            return
        nodes: dict[str, list[int]] = {}
        for report in self.reports:
            nodes.setdefault(report.node, []).append(report.rank)
        # NCCL ends the process of a rank that waits too long: then this is what is found
        what, fix = "the ranks were joined and did not come to the end of the measurement", "The ranks' output tells who met what."
        self._write([*self.judged, Finding(check="all_reduce", level="fail", what=what, fix=fix)], None)
        store.set("nodes", json.dumps(list(nodes.values())))
        store.set("joined", "yes")

    def _measure(self, store: Store, nodes: Sequence[Sequence[int]]) -> Measured:
        world, config = self.world, self.config
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=self.patience)
        clocks = measure.clock_offsets(world.size)
        several = world.size > 1
        all_reduce = measure.all_reduce_gb_s(world.device, world.size) if several else None
        exchanges = measure.exchanges_gb_s(world.device, world.rank, nodes)
        read, unread = self._read(nodes)
        store.set(f"read/{world.rank}", json.dumps([read, unread]))
        measure.wait_for_all()
        if not world.is_first:
            return Measured(ranks=world.size, nodes=())
        names = [next(report.node for report in self.reports if report.rank == ranks[0]) for ranks in nodes]
        reads = {name: json.loads(store.get(f"read/{ranks[0]}")) for name, ranks in zip(names, nodes, strict=True)}
        needed = reading.needed_bytes_s(config, world.size, world.device) if any(rate is not None for rate, _ in reads.values()) else None
        return Measured(
            ranks=world.size,
            nodes=tuple(names),
            clocks={name: clocks[ranks[0]] for name, ranks in zip(names, nodes, strict=True)},
            all_reduce_gb_s=all_reduce,
            exchanges_gb_s=exchanges,
            reads_mb_s={name: rate / 1e6 for name, (rate, _) in reads.items() if rate is not None},
            unread={name: why for name, (_, why) in reads.items() if why},
            needed_mb_s=None if needed is None else needed[0] / len(nodes) / 1e6,
            needed_from="" if needed is None else needed[1],
        )

    def _read(self, nodes: Sequence[Sequence[int]]) -> tuple[float | None, str]:
        """Read shards, on the first rank of each node; bytes a second, or why not."""
        measure.wait_for_all()  # all nodes at once, as in training
        number = next((number for number, ranks in enumerate(nodes) if ranks[0] == self.world.rank), None)
        if number is None:
            return None, ""
        try:
            return reading.read_bytes_s(self.config, number), ""
        except (MmscaleError, OSError) as e:
            return None, str(e)

    def _conclude(self, findings: Sequence[Finding], measured: Measured | None) -> int:
        """Write nodes.json and print the table (first rank)."""
        self._write(findings, measured)
        print(f"The nodes of {self.config.run}:\n{render(findings)}", flush=True)
        return UNFIT if _failed(findings) else 0

    def _write(self, findings: Sequence[Finding], measured: Measured | None) -> None:
        figures: dict[str, Any] = {} if measured is None else asdict(measured)
        if measured is not None:
            pairs = measured.exchanges_gb_s.items()
            figures["exchanges_gb_s"] = [[measured.nodes[a], measured.nodes[b], rate] for (a, b), rate in pairs]
        record = {
            "launch_id": os.environ.get("MMSCALE_LAUNCH_ID", "").partition("/")[0] or None,
            "time": time.time(),
            "state": "failed" if _failed(findings) else "passed",
            "failed_nodes": failed_nodes(findings),
            "findings": [asdict(finding) for finding in findings],
            "measured": figures,
            "nodes": {report.node: asdict(report.facts) for report in self.reports if report.facts is not None},
        }
        path = RunFolder(Path(self.config.run)).nodes
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(record) + "\n")  # on one line, which the script of a job searches

    def _say_unreachable(self, error: Exception) -> int:
        """This rank cannot meet the others, or cannot let them meet."""
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        said = _first_line(error)
        if self.world.is_first:
            what = f"{node_name()} cannot listen at {where}: {said}"
            fix = "Another process has the port: give another one (--master-port), or end it."
            self._conclude([Finding(check="port", level="fail", what=what, fix=fix)], None)
        else:
            print(
                f"mmscale: error: rank {self.world.rank} on {node_name()} has not reached {where} in {self.asked.limits.patience_s:g} s: "
                f"{said}. Let connections between the nodes through, or name the right network (MASTER_ADDR, GLOO_SOCKET_IFNAME).",
                flush=True,
            )
        return UNFIT

    def _say_broken(self, error: Exception) -> int:
        """The measurement did not come to its end."""
        said = _first_line(error)
        print(f"mmscale: error: rank {self.world.rank} on {node_name()}: {said}", flush=True)
        if self.world.is_first:
            fix = "The ranks' output tells who met what. Let connections between all nodes through, on every port."
            what = f"the ranks could not be joined and measured: {said}"
            self._conclude([*self.judged, Finding(check="all_reduce", level="fail", what=what, fix=fix)], None)
        return UNFIT

    def _part(self, store: Store, code: int) -> int:
        """Leave; the first rank last, as it serves the store."""
        if dist.is_initialized():
            dist.destroy_process_group()
        gone, deadline = store.add("gone", 1), time.monotonic() + LEAVE_S
        while self.world.is_first and gone < len(self.reports) and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = store.add("gone", 0)
        return code


def _first_line(error: Exception) -> str:
    """What torch's errors say; a stack of C++ follows."""
    return str(error).partition("\n")[0]


def _failed(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "fail" for finding in findings)


def _read(text: bytes) -> RankReport:
    record = json.loads(text)
    facts = record["facts"]
    return RankReport(**{**record, "facts": None if facts is None else NodeFacts.of(facts)})
