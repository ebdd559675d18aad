"""Engines: from a LaunchPlan to a command. Each is a module of the same four functions."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from launcher.cluster import EngineName
from launcher.plan import LaunchPlan


class Engine(Protocol):
    """What a module of this package offers."""

    def command(self, plan: LaunchPlan) -> list[str]:
        """The command line, the name of the program first. Pure."""

    def variables(self, plan: LaunchPlan) -> dict[str, str]:
        """Environment variables for the command, besides the launcher's own. Pure."""

    def files(self, plan: LaunchPlan) -> dict[Path, str]:
        """The files that the command needs beside it, in the run folder. Pure."""

    def program(self, plan: LaunchPlan) -> str:
        """Path of the program; raises RunError where it or what it needs is not installed."""


def engine_of(name: EngineName) -> Engine:
    """The engine of a name."""
    from launcher.engines import deepspeed, slurm, torchrun

    engines: dict[EngineName, Engine] = {"deepspeed": deepspeed, "torchrun": torchrun, "slurm": slurm}
    return engines[name]
