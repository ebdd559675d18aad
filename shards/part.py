"""Which part of a data set one command writes: `i/n` by hand, or from the SLURM job it runs in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import ConfigError

WHOLE = "all"


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number` of `count`."""

    number: int
    """From 1."""
    count: int

    def __str__(self) -> str:
        """As it is typed: `2/8`."""
        return f"{self.number}/{self.count}"

    def shards(self, total: int) -> range:
        """Numbers of the shards of this part: a contiguous run, so that neighbours in the source are read by one part."""
        return range((self.number - 1) * total // self.count, self.number * total // self.count)


def choose_part(text: str | None, environment: Mapping[str, str]) -> Part:
    """Read `i/n` or `all`; without either, ask SLURM: its array, and within that the tasks that srun has started.

    Args:
        text: the key `part` of the configuration.
        environment: variables of the process.

    Raises:
        ConfigError: not of that form, or an array whose numbers are not evenly spaced.
    """
    if text is None:
        return _slurm_part(environment)
    if text == WHOLE:
        return Part(1, 1)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"`part` must be i/n with i from 1 to n, such as 1/4 to 4/4, or `{WHOLE}`; got {text!r}.")
    return Part(int(match[1]), int(match[2]))


def _slurm_part(environment: Mapping[str, str]) -> Part:
    """Take the array task first, the rank inside its job step second.

    SLURM_STEP_NUM_TASKS is set by srun alone: a batch script, which is one process whatever it has reserved, is one part.
    """
    task, tasks = _array_task(environment)
    rank, ranks = 0, 1
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        rank, ranks = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    return Part(task * ranks + rank + 1, tasks * ranks)


def _array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    names = {"ID": None, "COUNT": None, "MIN": 0, "MAX": None, "STEP": 1}
    found = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", default) for name, default in names.items()}
    number, count, least, last, step = (None if value is None else int(value) for value in found.values())
    if number is None or count is None or least is None or not step:
        raise ConfigError("SLURM_ARRAY_TASK_ID is set without SLURM_ARRAY_TASK_COUNT. Give part=i/n, or part=all for the whole.")
    index, rest = divmod(number - least, step)
    if rest or not 0 <= index < count or (last is not None and last != least + step * (count - 1)):
        raise ConfigError(
            f"The {count} tasks of this SLURM array are not numbered evenly from {least} on: {number} does not say which part it is. "
            "Submit the array as 0-N, or give part=i/n."
        )
    return index, count
