"""From what the user asked for to a run: look at the machine, load the configuration, plan, and carry the plan out."""

from __future__ import annotations

import os
import secrets
import shlex
import time
from pathlib import Path

from launcher.engines import engine_of
from launcher.machine import free_port, this_machine
from launcher.plan import LaunchPlan, LaunchRequest, make_plan
from mmscale.config import load_run_config


def plan_here(request: LaunchRequest, master_port: int | None = None) -> LaunchPlan:
    """Plan a launch from this machine, this environment and this working directory.

    Raises:
        ConfigError: the configuration cannot be loaded, or the topology cannot be had.
    """
    return make_plan(
        request,
        load_run_config(request.arguments[0], request.arguments[1:]),
        machine=this_machine(),
        environment=os.environ,
        launch_id=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        master_port=master_port or free_port(),
        here=Path.cwd(),
    )


def describe(plan: LaunchPlan) -> str:
    """Render a plan: its topology, its variables and the command that carries it out."""
    engine = engine_of(plan.engine)
    hosts = ", ".join(f"{host} x {ranks}" for host, ranks in plan.hosts)
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(engine.variables(plan).items()))
    shown = f"{variables} {shlex.join(engine.command(plan))}"
    return f"run      {plan.run}\nranks    {plan.ranks} ({hosts})\nlogs     {plan.logs}\ncommand  {shown}"


def launch(request: LaunchRequest, master_port: int | None = None, *, dry_run: bool = False) -> int:
    """Plan a launch and carry it out, or only print it.

    Returns:
        The exit code, as `launcher.supervise.supervise`.

    Raises:
        ConfigError, RunError: as `plan_here` and `supervise`.
    """
    plan = plan_here(request, master_port)
    if dry_run:
        print(describe(plan))
        return 0
    from launcher.supervise import supervise

    return supervise(plan)
