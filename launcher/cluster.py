"""The configuration of a cluster: who starts the ranks, where, and with which environment. `configs/cluster/*.yaml` are examples.

A cluster file says nothing of what is trained, and a stage file says nothing of where: any of the one runs on any of the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mmscale.config import find_part
from mmscale.nodes.limits import NodeLimits
from shards import configfile
from shards.configfile import need

EngineName = Literal["deepspeed", "torchrun", "slurm"]
TRAVEL = ["OMP_NUM_THREADS", "DS_ACCELERATOR", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "TORCH_*"]
_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostsConfig:
    """Hosts that are reached over pdsh and ssh (engines deepspeed and torchrun)."""

    hostfile: str | None = None
    """File of `HOST slots=N` lines; null: this machine alone. A missing file is an error."""
    include: str | None = None
    """Use only these, `HOST@HOST` or `HOST:0,2@HOST:1` (slots), as DeepSpeed's --include."""
    exclude: str | None = None
    """Use all but these, in the same form."""
    master_address: str | None = None
    """Address of the first host that the others reach; null: its name in the hostfile."""
    launcher_address: str | None = None
    """Address of this machine that the hosts reach; null: the one from which the first host is reached."""
    silence_s: float = 30.0
    """A host that says nothing for so long is taken for lost and the run ends; ranks that hear nothing end after twice as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """What the sbatch script asks for. Null leaves a line out, so that the site's default counts."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    """Of a node, such as `gpu:h100:8`; null: none is asked for."""
    constraint: str | None = None
    time: str = "24:00:00"
    """Time limit of one stretch of the run; a run that needs longer is requeued and goes on."""
    cpus_per_task: int | None = None
    mem: str | None = None
    """Of a node, such as `0` for all of it."""
    exclude: str | None = None
    """Nodes that are not to be used, such as `n[3,7-9]`."""
    options: list[str] = field(default_factory=list)
    """Further options, each a `#SBATCH` line of its own, such as `--exclusive`."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of `srun`, a container's among them: `--container-image=...`, `--container-mounts=...`."""
    signal_s: int = 300
    """Seconds before the time limit at which the ranks are asked to commit a checkpoint and stop."""
    restarts: int = 3
    """Restarts after failures without a new checkpoint between them; then the job ends with exit code 86."""
    node_failures: int = 2
    """Failures that begin on a node before the job is kept away from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChecksConfig(NodeLimits):
    """The check of the nodes by their own ranks before every start (`mmscale.nodes`)."""

    run: bool | None = None
    """Whether it is made; null: where there are several nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Where ranks run."""

    engine: EngineName = "deepspeed"
    """Who starts the ranks."""
    nodes: int | None = None
    """Nodes to use; null: all of the hostfile's, or one."""
    ranks_per_node: int | None = None
    """Null: one a CUDA device of this machine, or one where there is none; with a hostfile, its slots."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the ranks, NCCL's settings among them."""
    travel: list[str] = field(default_factory=lambda: list(TRAVEL))
    """Names of the launcher's own variables that ranks on other hosts get too; `NCCL_*` takes all that begin so."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that are run on a node before its ranks, such as `module load cuda` (engine slurm)."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)

    def check(self) -> None:
        """Check what can be checked without a machine.

        Raises:
            ConfigError: a value that cannot be.
        """
        for key, value in (
            ("nodes", self.nodes),
            ("ranks_per_node", self.ranks_per_node),
            ("slurm.cpus_per_task", self.slurm.cpus_per_task),
        ):
            need(value is None or value >= 1, f"`{key}` of the cluster must be at least 1 or null; got {value}.")
        need(
            self.hosts.silence_s >= 5,
            f"`hosts.silence_s` must be at least 5 s, or a busy network looks like a lost host; got {self.hosts.silence_s:g}.",
        )
        need(
            self.hosts.hostfile is not None or (self.hosts.include or self.hosts.exclude) is None,
            "`hosts.include` and `hosts.exclude` choose among the hosts of a hostfile: set `hosts.hostfile` (or --hostfile) too.",
        )
        need(self.hosts.include is None or self.hosts.exclude is None, "Set `hosts.include` or `hosts.exclude`, not both.")
        need(
            self.engine != "slurm" or self.hosts.hostfile is None,
            "`engine: slurm` gets its hosts from SLURM: take `hosts.hostfile` (or --hostfile) away, or use another engine.",
        )
        need(
            self.engine == "slurm" or not self.setup,
            f"`setup` is for `engine: slurm`; `{self.engine}` runs no lines of a shell before the ranks.",
        )
        for name in self.environment:
            need(_VARIABLE.fullmatch(name) is not None, f"`environment` of the cluster: {name!r} is no name of a variable.")
        self.checks.check()
        self._check_slurm()

    def _check_slurm(self) -> None:
        slurm = self.slurm
        need(
            _TIME.fullmatch(slurm.time) is not None,
            f"`slurm.time` must be minutes, HH:MM:SS or D-HH:MM:SS, in quotes; got {slurm.time!r}.",
        )
        limit = time_limit_s(slurm.time)
        need(
            0 < slurm.signal_s < limit,
            f"`slurm.signal_s` must lie between 0 and the time limit `slurm.time` = {slurm.time} ({limit} s); got {slurm.signal_s}. "
            "It must leave time for the step that runs and for a checkpoint.",
        )
        for key in ("restarts", "node_failures"):
            need(getattr(slurm, key) >= 1, f"`slurm.{key}` must be at least 1; got {getattr(slurm, key)}.")
        for option in (*slurm.options, *slurm.srun_options):
            need(option.startswith("-"), f"`slurm.options` and `slurm.srun_options` hold options that begin with `-`; got {option!r}.")


def load_cluster(name: str | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Load a cluster by the name of a part (`slurm` is `configs/cluster/slurm.yaml`) or the path of a YAML file, and check it.

    Args:
        name: None for the defaults: this machine, engine deepspeed.
        overrides: `key=value` words that go over it.

    Raises:
        ConfigError: no such file, an unknown key, a value that cannot be.
    """
    cluster = configfile.load(ClusterConfig, None if name is None else find_part("cluster", name), overrides)
    cluster.check()
    return cluster


def time_limit_s(text: str) -> int:
    """Seconds of a time as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
