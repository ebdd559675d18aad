"""A plan as a command of torchrun: on this machine, or over pdsh as one agent a host with a c10d rendezvous on the first."""

from __future__ import annotations

import shlex
from pathlib import Path

from launcher.engines.programs import find_program, need_pdsh
from launcher.plan import LaunchPlan
from shards.errors import ConfigError


def command(plan: LaunchPlan) -> list[str]:
    """The command line, the name of the program first. Pure."""
    module = ["--module", "launcher.rank", plan.module, *plan.arguments]
    if plan.is_local:
        where = ["--nnodes", "1", "--nproc-per-node", str(plan.ranks), "--master-addr", "127.0.0.1", "--master-port", str(plan.master_port)]
        return ["torchrun", *where, *module]
    exports = [f"export {name}={shlex.quote(value)};" for name, value in plan.environment]
    hosts = ",".join(host for host, _ in plan.hosts)
    return ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", hosts, " ".join([f"cd {shlex.quote(str(plan.here))};", *exports, _agent(plan)])]


def _agent(plan: LaunchPlan) -> str:
    """The shell command of one host; pdsh puts the number of the host where `%n` is."""
    counts = {len(slots) for _, slots in plan.hosts}
    if len(counts) != 1:
        raise ConfigError(
            "`--engine torchrun` starts as many ranks on every host, and the hosts chosen have different slots: "
            f"{', '.join(f'{host} {len(slots)}' for host, slots in plan.hosts)}. Give --ranks-per-node, or use --engine deepspeed."
        )
    first = plan.cluster.hosts.master_address or plan.hosts[0][0]
    words = ["exec", plan.python, "-m", "torch.distributed.run", "--nnodes", str(plan.nodes), "--nproc-per-node", str(counts.pop())]
    words += ["--rdzv-backend", "c10d", "--rdzv-id", plan.launch_id.replace("/", "-"), "--rdzv-endpoint", f"{first}:{plan.master_port}"]
    # by its number, and not by torchrun's guess, which compares names and addresses
    conf = "--rdzv-conf is_host=$([ %n = 0 ] && echo 1 || echo 0),join_timeout=120"
    return f"{shlex.join(words)} {conf} {shlex.join(['--module', 'launcher.rank', plan.module, *plan.arguments])}"


def variables(plan: LaunchPlan) -> dict[str, str]:
    """Environment variables for the command, besides the launcher's own. Pure."""
    return dict(plan.environment) if plan.is_local else {}


def files(plan: LaunchPlan) -> dict[Path, str]:
    """Nothing is needed beside the command."""
    return {}


def program(plan: LaunchPlan) -> str:
    """Path of `torchrun`, or of pdsh for several hosts.

    Raises:
        RunError: it is not installed.
    """
    return find_program("torchrun") if plan.is_local else need_pdsh()
