"""A plan as a command of DeepSpeed's own launcher, and where that puts the ranks' output.

Written against DeepSpeed 0.19.8, `deepspeed/launcher/{runner,launch}.py`; docs/launch.md tells what it does with the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from launcher.plan import LaunchPlan
from mmscale.errors import RunError

_RANK_LOG = re.compile(r"_rank(\d+)\.log$")


def command(plan: LaunchPlan) -> list[str]:
    """The command line, the name of the program first. Pure."""
    words = ["deepspeed"]
    if plan.hostfile is not None:
        words += ["--hostfile", str(plan.hostfile), "--num_nodes", str(plan.nodes), "--force_multi"]
        if len({ranks for _, ranks in plan.hosts}) == 1:
            words += ["--num_accelerators", str(plan.hosts[0][1])]
    elif plan.devices is not None:
        words += ["--include", f"localhost:{','.join(plan.devices)}"]
    else:
        words += ["--num_accelerators", str(plan.ranks)]
    if plan.master_address is not None:
        words += ["--master_addr", plan.master_address]
    words += ["--master_port", str(plan.master_port), "--log_level", "error", "--no_local_rank"]
    return [*words, "--enable_each_rank_log", str(plan.logs), "--module", plan.module, *plan.arguments]


def variables(plan: LaunchPlan) -> dict[str, str]:
    """Environment variables for the command, besides the launcher's own. Pure.

    To other nodes DeepSpeed hands on only some variables and those of a file, which DS_ENV_FILE names (see `prepare`).
    """
    return dict(plan.environment) | ({} if plan.is_local else {"DS_ENV_FILE": str(plan.logs / "environment")})


def prepare(plan: LaunchPlan) -> None:
    """Write what the command needs beside it: for other nodes, the file of their variables.

    Raises:
        RunError: several nodes, and pdsh is not installed.
    """
    if plan.is_local:
        return
    if shutil.which("pdsh") is None:
        raise RunError(
            "DeepSpeed starts ranks on other hosts over pdsh, and there is no `pdsh` on this machine's PATH. Install the package pdsh."
        )
    theirs = [folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env") for folder in (Path.home(), Path())]
    lines = [line.strip() for path in theirs if path.is_file() for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
    lines += [f"{name}={value}" for name, value in plan.environment]
    (plan.logs / "environment").write_text("\n".join(lines) + "\n", encoding="utf-8")


def program() -> str:
    """Path of the `deepspeed` program of the Python that runs this.

    Raises:
        RunError: it is not installed.
    """
    return find_program("deepspeed")


def find_program(name: str) -> str:
    """Find a program beside the running Python, or else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RunError(
            f"There is no program `{name}` beside {sys.executable} nor on PATH. Install mmscale with its requirements: pip install -e ."
        )
    return found


def rank_logs(plan: LaunchPlan) -> dict[int, list[Path]]:
    """The files that hold each rank's output so far. DeepSpeed names them by the second they were opened in."""
    found: dict[int, list[Path]] = {}
    for path in sorted(plan.logs.glob("*_rank*.log")):
        match = _RANK_LOG.search(path.name)
        if match is not None:
            found.setdefault(int(match.group(1)), []).append(path)
    return found
