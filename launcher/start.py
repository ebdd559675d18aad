"""From what the user asked for to a run: look at the machine, load the configuration, plan, and carry the plan out."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.cluster import load_cluster
from launcher.engines import engine_of
from launcher.hosts import read_hostfile
from launcher.machine import this_machine
from launcher.places import check_places
from launcher.plan import Launcher, LaunchPlan, LaunchRequest, make_plan
from mmscale.config import load_run_config
from mmscale.ports import free_port


def request(
    arguments: Sequence[str], cluster: str | None, words: Sequence[str], *, module: str = "mmscale.train", grace_s: float = 60.0
) -> LaunchRequest:
    """Put together what the user asked for: the cluster file, the words over it, the hostfile that it names.

    Raises:
        ConfigError: a cluster that cannot be, a hostfile that cannot be read.
    """
    where = load_cluster(cluster, words)
    hosts = None if where.hosts.hostfile is None else read_hostfile(Path(where.hosts.hostfile))
    return LaunchRequest(arguments=tuple(arguments), cluster=where, module=module, hosts=hosts, grace_s=grace_s)


def plan_here(request: LaunchRequest, master_port: int | None = None) -> LaunchPlan:
    """Plan a launch from this machine, this environment and this working directory.

    Raises:
        ConfigError: the configuration cannot be loaded, or the topology cannot be had.
    """
    launcher = Launcher(
        machine=this_machine(),
        environment=os.environ,
        here=Path.cwd(),
        python=sys.executable,
        launch_id=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        port=master_port or free_port(),
        travelling=_deepspeed_env() if request.hosts is not None else {},
    )
    return make_plan(request, load_run_config(request.arguments[0], request.arguments[1:]), launcher)


def describe(plan: LaunchPlan) -> str:
    """Render a plan whole: its topology, the ranks' variables, the command that carries it out and the files beside it."""
    engine = engine_of(plan.engine)
    hosts = ", ".join(f"{host} x {len(slots)}" for host, slots in plan.hosts)
    lines = [f"engine   {plan.engine}", f"run      {plan.run}", f"ranks    {plan.ranks} ({hosts})"]
    if plan.engine != "slurm":
        lines += [f"logs     {plan.logs}"]
    lines += [f"{'sets' if n == 0 else '':<9}{name}={value}" for n, (name, value) in enumerate(plan.environment)]
    own = [
        f"{name}={shlex.quote(value)}" for name, value in sorted(engine.variables(plan).items()) if (name, value) not in plan.environment
    ]
    if plan.checks_nodes and plan.engine != "slurm":  # whose script has both
        lines += [f"first    {shlex.join(engine.command(plan.of_check()))}"]
    lines += [f"command  {' '.join([*own, shlex.join(engine.command(plan))])}"]
    for path, text in engine.files(plan).items():
        lines += [f"file     {path}", *(f"  | {line}".rstrip() for line in text.splitlines())]
    return "\n".join(lines)


def launch(request: LaunchRequest, master_port: int | None = None, *, dry_run: bool = False) -> int:
    """Plan a launch and carry it out, or only print it.

    Returns:
        The exit code, as `launcher.supervise.supervise`; 0 for a job that was submitted.

    Raises:
        MmscaleError: as `plan_here`, `check_places`, `supervise` and `submit`.
    """
    plan = plan_here(request, master_port)
    if dry_run:
        print(describe(plan))
        return 0
    if plan.engine == "slurm":
        from launcher.submit import submit

        return submit(plan)
    from launcher.supervise import supervise

    if plan.is_local and request.module == "mmscale.train":
        check_places(load_run_config(request.arguments[0], request.arguments[1:]))
    return supervise(plan)


def _deepspeed_env() -> dict[str, str]:
    """What DeepSpeed itself would hand to other hosts: the lines of its file in the home and the working directory."""
    found: dict[str, str] = {}
    for path in (folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env") for folder in (Path.home(), Path())):
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found |= dict(line.strip().split("=", 1) for line in lines if "=" in line)
    return found
