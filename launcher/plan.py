"""From a configuration and a topology to a frozen LaunchPlan: a pure function; nothing is read, written or started here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.machine import Machine
from mmscale.arithmetic import plan_batch
from mmscale.config import RunConfig
from shards.errors import ConfigError

EngineName = Literal["deepspeed", "torchrun"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """What the user asked for."""

    arguments: tuple[str, ...]
    """What every rank gets: the configuration file, then `key=value` words."""
    engine: EngineName = "deepspeed"
    module: str = "mmscale.train"
    """The module that every rank runs."""
    ranks_per_node: int | None = None
    """None: one a CUDA device, or one on a machine without any; with a hostfile, its slots."""
    hostfile: Path | None = None
    hosts: Mapping[str, int] | None = None
    """The hostfile's content: host -> slots, in order."""
    nodes: int | None = None
    """Use only so many of the hostfile's hosts, the first ones."""
    master_address: str | None = None
    """Address of the first host; None: DeepSpeed asks that host."""
    grace_s: float = 15.0
    """Time the ranks get to end after a signal before they are killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Everything that starting a run needs, decided."""

    engine: EngineName
    launch_id: str
    """Names this attempt: in MMSCALE_LAUNCH_ID of every rank, in status.json, in the log folder."""
    run: Path
    """The run folder, absolute."""
    logs: Path
    """Folder of the ranks' output for this launch."""
    module: str
    arguments: tuple[str, ...]
    hosts: tuple[tuple[str, int], ...]
    """(host, ranks) of each node; one pair with `localhost` for this machine alone."""
    hostfile: Path | None
    devices: tuple[str, ...] | None
    """CUDA indexes to use on this machine where CUDA_VISIBLE_DEVICES restricts them; else None."""
    master_address: str | None
    master_port: int
    environment: tuple[tuple[str, str], ...]
    """Variables set for the ranks, besides those the launcher was started with."""
    grace_s: float

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def ranks(self) -> int:
        return sum(ranks for _, ranks in self.hosts)

    @property
    def is_local(self) -> bool:
        """The ranks run on this machine, as descendants of the launcher."""
        return self.hostfile is None


def make_plan(
    request: LaunchRequest,
    config: RunConfig,
    *,
    machine: Machine,
    environment: Mapping[str, str],
    launch_id: str,
    master_port: int,
    here: Path,
) -> LaunchPlan:
    """Decide a launch.

    Args:
        request: what the user asked for.
        config: the configuration that `request.arguments` load to.
        machine: this machine.
        environment: the launcher's own environment variables; what the user has set is left as it is.
        launch_id: a name that no other launch has.
        master_port: the rendezvous port.
        here: the working directory, which relative paths start from.

    Raises:
        ConfigError: a topology that cannot be had, or that the global batch does not divide over.
    """
    run = (here / config.run).resolve()
    hosts = _hosts(request, machine)
    ranks = sum(count for _, count in hosts)
    devices = _devices(request, machine, ranks) if request.hosts is None else None
    plan_batch(config, ranks)
    return LaunchPlan(
        engine=request.engine,
        launch_id=launch_id,
        run=run,
        logs=run / "logs" / launch_id,
        module=request.module,
        arguments=request.arguments,
        hosts=hosts,
        hostfile=request.hostfile,
        devices=devices,
        master_address=request.master_address,
        master_port=master_port,
        environment=_environment(request, machine, environment, run, launch_id, ranks),
        grace_s=request.grace_s,
    )


def _hosts(request: LaunchRequest, machine: Machine) -> tuple[tuple[str, int], ...]:
    if request.ranks_per_node is not None and request.ranks_per_node < 1:
        raise ConfigError(f"`--ranks-per-node` must be at least 1; got {request.ranks_per_node}.")
    if request.hosts is None:
        if (request.nodes or 1) != 1:
            raise ConfigError(f"`--nodes {request.nodes}` needs a list of the nodes: give --hostfile FILE with `HOST slots=N` lines.")
        return (("localhost", request.ranks_per_node or len(machine.devices or ()) or 1),)
    if request.engine == "torchrun":
        raise ConfigError("`--engine torchrun` starts ranks on this machine only and takes no --hostfile. Use --engine deepspeed.")
    hosts = list(request.hosts.items())
    nodes = len(hosts) if request.nodes is None else request.nodes
    if not 1 <= nodes <= len(hosts):
        raise ConfigError(f"`--nodes` must be between 1 and the {len(hosts)} hosts of {request.hostfile}; got {nodes}.")
    for host, slots in hosts[:nodes]:
        if (request.ranks_per_node or 1) > slots:
            raise ConfigError(
                f"`--ranks-per-node {request.ranks_per_node}` is more than the {slots} slots of the host {host!r} in {request.hostfile}."
            )
    return tuple((host, request.ranks_per_node or slots) for host, slots in hosts[:nodes])


def _devices(request: LaunchRequest, machine: Machine, ranks: int) -> tuple[str, ...] | None:
    """DeepSpeed forgets CUDA_VISIBLE_DEVICES once it is told a number of ranks, so the indexes are given by name then."""
    if machine.accelerator != "cuda" or machine.devices is None:
        return None
    if ranks > len(machine.devices):
        raise ConfigError(
            f"`--ranks-per-node {ranks}` is more than the {len(machine.devices)} CUDA devices here ({', '.join(machine.devices)})."
        )
    if not machine.devices_are_restricted or request.engine == "torchrun":
        return None
    if not all(name.isdigit() for name in machine.devices):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={','.join(machine.devices)} names devices otherwise than by index, which DeepSpeed's launcher does not "
            "understand. Give indexes, or use --engine torchrun."
        )
    return machine.devices[:ranks]


def _environment(
    request: LaunchRequest, machine: Machine, environment: Mapping[str, str], run: Path, launch_id: str, ranks: int
) -> tuple[tuple[str, str], ...]:
    wanted = {"MMSCALE_LAUNCH_ID": launch_id, "MMSCALE_RUN": str(run)}
    if request.hosts is None:
        if "OMP_NUM_THREADS" not in environment:
            wanted["OMP_NUM_THREADS"] = str(max(1, machine.cores // ranks))
        if machine.accelerator == "cpu" and "DS_ACCELERATOR" not in environment:
            wanted["DS_ACCELERATOR"] = "cpu"
    return tuple(sorted(wanted.items()))
