"""A plan as a command of torchrun, for ranks on this machine."""

from __future__ import annotations

from pathlib import Path

from launcher.engines import deepspeed
from launcher.plan import LaunchPlan


def command(plan: LaunchPlan) -> list[str]:
    """The command line, the name of the program first. Pure."""
    words = [
        "torchrun",
        "--nnodes",
        "1",
        "--nproc-per-node",
        str(plan.ranks),
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(plan.master_port),
    ]
    return [*words, "--log-dir", str(plan.logs), "--redirects", "3", "--module", plan.module, *plan.arguments]


def variables(plan: LaunchPlan) -> dict[str, str]:
    """Environment variables for the command, besides the launcher's own. Pure."""
    return dict(plan.environment)


def prepare(plan: LaunchPlan) -> None:
    """Nothing is needed beside the command."""


def program() -> str:
    """Path of the `torchrun` program of the Python that runs this.

    Raises:
        RunError: it is not installed.
    """
    return deepspeed.find_program("torchrun")


def rank_logs(plan: LaunchPlan) -> dict[int, list[Path]]:
    """The files that hold each rank's output so far: LOGS/NAME/attempt_0/RANK/{stdout,stderr}.log."""
    found: dict[int, list[Path]] = {}
    for path in sorted(plan.logs.glob("*/attempt_*/*/std*.log")):
        found.setdefault(int(path.parent.name), []).append(path)
    return found
