"""From a configuration, a cluster and a topology to a frozen LaunchPlan: a pure function; nothing is read, written or started here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from launcher.cluster import ClusterConfig, EngineName
from launcher.hosts import Slots, choose_hosts
from launcher.machine import Machine
from mmscale.arithmetic import plan_batch
from mmscale.config import RunConfig
from shards.errors import ConfigError

INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""An outer launcher's variables; the ranks must not take them for their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """What the user asked for."""

    arguments: tuple[str, ...]
    """What every rank gets: the configuration file, then `key=value` words."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    module: str = "mmscale.train"
    """The module that every rank runs."""
    hosts: Mapping[str, int] | None = None
    """The content of `cluster.hosts.hostfile`: host -> slots, in order."""
    grace_s: float = 60.0
    """Time the ranks get to end after a signal before they are killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """The process that launches, as far as a plan depends on it."""

    machine: Machine
    environment: Mapping[str, str]
    """Its environment variables; what the user has set is left as it is."""
    here: Path
    """The working directory, which relative paths start from and the ranks work in."""
    python: str
    """The interpreter; the same path on every node."""
    launch_id: str
    """A name that no other launch has."""
    port: int
    """The rendezvous port."""
    travelling: Mapping[str, str] = field(default_factory=dict)
    """What the user's `.deepspeed_env` files hold, for ranks on other hosts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Everything that starting a run needs, decided."""

    launch_id: str
    """Names this attempt: in MMSCALE_LAUNCH_ID of every rank, in status.json, in the log folder."""
    run: Path
    """The run folder, absolute."""
    here: Path
    python: str
    module: str
    arguments: tuple[str, ...]
    cluster: ClusterConfig
    hosts: tuple[tuple[str, Slots], ...]
    """(host, slots) of each node: a rank a slot. `localhost` for this machine alone, `node-N` of the job under SLURM."""
    devices: tuple[str, ...] | None
    """CUDA indexes to use on this machine where CUDA_VISIBLE_DEVICES restricts them; else None."""
    master_port: int
    environment: tuple[tuple[str, str], ...]
    """Variables set for the ranks, besides those that ranks on this machine inherit."""
    grace_s: float

    @property
    def engine(self) -> EngineName:
        return self.cluster.engine

    @property
    def nodes(self) -> int:
        return len(self.hosts)

    @property
    def ranks(self) -> int:
        return sum(len(slots) for _, slots in self.hosts)

    @property
    def is_local(self) -> bool:
        """The ranks run on this machine, as descendants of the launcher."""
        return self.engine != "slurm" and self.cluster.hosts.hostfile is None

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output for this launch."""
        return self.run / "logs" / self.launch_id

    @property
    def checks_nodes(self) -> bool:
        """Whether the ranks look at their nodes before they run."""
        return self.nodes > 1 if self.cluster.checks.run is None else self.cluster.checks.run

    def of_check(self) -> LaunchPlan:
        """The same ranks, with the check of the nodes as their program; its output lies in a folder of the launch's."""
        launch_id = f"{self.launch_id}/nodes"
        options = self.cluster.checks.options()
        if self.engine == "deepspeed" and not self.is_local:  # whose ranks have the order of the hosts; torchrun's have not
            options += ["--hosts", ",".join(f"{host}:{len(slots)}" for host, slots in self.hosts)]
        return replace(
            self,
            launch_id=launch_id,
            module="mmscale.nodes",
            arguments=(*options, *self.arguments),
            environment=tuple((name, launch_id if name == "MMSCALE_LAUNCH_ID" else value) for name, value in self.environment),
        )

    def rank_log(self, rank: int) -> Path:
        """All that a rank prints."""
        return self.logs / f"rank-{rank}.log"


def make_plan(request: LaunchRequest, config: RunConfig, launcher: Launcher) -> LaunchPlan:
    """Decide a launch.

    Args:
        request: what the user asked for.
        config: the configuration that `request.arguments` load to.
        launcher: where and by whom it is asked for.

    Raises:
        ConfigError: a topology that cannot be had, or that the global batch does not divide over.
    """
    run = (launcher.here / config.run).resolve()
    hosts = _hosts(request, launcher.machine)
    is_local = request.cluster.engine != "slurm" and request.hosts is None
    ranks = sum(len(slots) for _, slots in hosts)
    devices = _devices(request, launcher.machine, ranks) if is_local else None
    plan_batch(config, ranks)
    return LaunchPlan(
        launch_id=launcher.launch_id,
        run=run,
        here=launcher.here,
        python=launcher.python,
        module=request.module,
        arguments=request.arguments,
        cluster=request.cluster,
        hosts=hosts,
        devices=devices,
        master_port=launcher.port,
        environment=_environment(request, launcher, run, ranks, is_local=is_local),
        grace_s=request.grace_s,
    )


def _hosts(request: LaunchRequest, machine: Machine) -> tuple[tuple[str, Slots], ...]:
    cluster = request.cluster
    if cluster.engine == "slurm":
        slots = tuple(range(cluster.ranks_per_node or 1))
        return tuple((f"node-{number}", slots) for number in range(cluster.nodes or 1))
    if request.hosts is not None:
        return choose_hosts(request.hosts, cluster)
    if (cluster.nodes or 1) != 1:
        raise ConfigError(
            f"{cluster.nodes} nodes need a list of the nodes: give --hostfile FILE with `HOST slots=N` lines, or use --engine slurm."
        )
    return (("localhost", tuple(range(cluster.ranks_per_node or len(machine.devices or ()) or 1))),)


def _devices(request: LaunchRequest, machine: Machine, ranks: int) -> tuple[str, ...] | None:
    """DeepSpeed forgets CUDA_VISIBLE_DEVICES once it is told a number of ranks, so the indexes are given by name then."""
    if machine.accelerator != "cuda" or machine.devices is None:
        return None
    if ranks > len(machine.devices):
        raise ConfigError(
            f"`--ranks-per-node {ranks}` is more than the {len(machine.devices)} CUDA devices here ({', '.join(machine.devices)})."
        )
    if not machine.devices_are_restricted or request.cluster.engine == "torchrun":
        return None
    if not all(name.isdigit() for name in machine.devices):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={','.join(machine.devices)} names devices otherwise than by index, which DeepSpeed's launcher does not "
            "understand. Give indexes, or use --engine torchrun."
        )
    return machine.devices[:ranks]


def _environment(request: LaunchRequest, launcher: Launcher, run: Path, ranks: int, *, is_local: bool) -> tuple[tuple[str, str], ...]:
    """Ranks on this machine inherit the launcher's variables; others get those on the cluster's list, and no more."""
    cluster, theirs = request.cluster, launcher.environment
    wanted: dict[str, str] = {}
    if is_local:
        if "OMP_NUM_THREADS" not in theirs:
            wanted["OMP_NUM_THREADS"] = str(max(1, launcher.machine.cores // ranks))
        if launcher.machine.accelerator == "cpu" and "DS_ACCELERATOR" not in theirs:
            wanted["DS_ACCELERATOR"] = "cpu"
    else:
        wanted |= {name: value for name, value in theirs.items() if any(fnmatchcase(name, pattern) for pattern in cluster.travel)}
        wanted |= launcher.travelling
    wanted |= {name: str(value) for name, value in cluster.environment.items()}
    wanted |= {"MMSCALE_RUN": str(run)}
    if cluster.engine != "slurm":  # there an id for every start of the job is made by the script
        wanted |= {"MMSCALE_LAUNCH_ID": launcher.launch_id}
    return tuple(sorted(wanted.items()))
