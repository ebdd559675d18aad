"""A plan as a command of DeepSpeed's own launcher.

Written against DeepSpeed 0.19.8, `deepspeed/launcher/{runner,launch}.py`; docs/launch.md tells what it does with the environment.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from launcher.engines.programs import find_program, need_pdsh
from launcher.plan import LaunchPlan


def command(plan: LaunchPlan) -> list[str]:
    """The command line, the name of the program first. Pure."""
    words, hosts = ["deepspeed"], plan.cluster.hosts
    if not plan.is_local:
        words += ["--hostfile", str(plan.logs / "hostfile"), "--force_multi"]
    elif plan.devices is not None:
        words += ["--include", f"localhost:{','.join(plan.devices)}"]
    else:
        words += ["--num_accelerators", str(plan.ranks)]
    if hosts.master_address is not None:
        words += ["--master_addr", hosts.master_address]
    if not plan.is_local and any(slots != tuple(range(len(slots))) for _, slots in plan.hosts):
        words += ["--include", "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in plan.hosts)]
    words += ["--master_port", str(plan.master_port), "--log_level", "error", "--no_local_rank"]
    arguments = plan.arguments if plan.is_local else tuple(map(_for_pdsh, plan.arguments))
    return [*words, "--module", "launcher.rank", plan.module, *arguments]


def _for_pdsh(word: str) -> str:
    """DeepSpeed puts only words with a space into quotes, double ones, before pdsh hands all of them to a shell of the other host."""
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def variables(plan: LaunchPlan) -> dict[str, str]:
    """Environment variables for the command, besides the launcher's own. Pure.

    To other nodes DeepSpeed hands on only some variables and those of a file, which DS_ENV_FILE names.
    """
    return dict(plan.environment) | ({} if plan.is_local else {"DS_ENV_FILE": str(plan.logs / "environment")})


def files(plan: LaunchPlan) -> dict[Path, str]:
    """For other hosts: those that were chosen, with the slots up to the last one used, and the ranks' variables. Pure."""
    if plan.is_local:
        return {}
    return {
        plan.logs / "hostfile": "".join(f"{host} slots={max(slots) + 1}\n" for host, slots in plan.hosts),
        plan.logs / "environment": "".join(f"{name}={value}\n" for name, value in plan.environment),
    }


def program(plan: LaunchPlan) -> str:
    """Path of the `deepspeed` program of the Python that runs this.

    Raises:
        RunError: it is not installed; several hosts, and pdsh is not installed.
    """
    if not plan.is_local:
        need_pdsh()
    return find_program("deepspeed")
