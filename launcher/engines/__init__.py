"""Engines: from a LaunchPlan to a command. Each is a module of the same five functions."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from launcher.plan import EngineName, LaunchPlan


class Engine(Protocol):
    """What a module of this package offers."""

    def command(self, plan: LaunchPlan) -> list[str]:
        """The command line, the name of the program first. Pure."""

    def variables(self, plan: LaunchPlan) -> dict[str, str]:
        """Environment variables for the command, besides the launcher's own. Pure."""

    def prepare(self, plan: LaunchPlan) -> None:
        """Write what the command needs beside it into `plan.logs`."""

    def program(self) -> str:
        """Path of the program."""

    def rank_logs(self, plan: LaunchPlan) -> dict[int, list[Path]]:
        """The files that hold each rank's output so far."""


def engine_of(name: EngineName) -> Engine:
    """The engine of a name."""
    from launcher.engines import deepspeed, torchrun

    engines: dict[EngineName, Engine] = {"deepspeed": deepspeed, "torchrun": torchrun}
    return engines[name]
