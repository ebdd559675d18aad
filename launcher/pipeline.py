"""Stages that depend on each other, each a command of mmscale: a pipeline file becomes a list of stages in order. Pure but for reading it.

Every command of mmscale that is run again goes on from what it has committed, so a pipeline need only know which stages are done.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards import configfile
from shards.configfile import need
from shards.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """An entry of `stages`."""

    name: str = "???"
    command: str = "???"
    """What follows `mmscale`, with {folder} and the grid's keys in braces."""
    after: list[str] = field(default_factory=list)
    """Stages that must be done before; the name of a grid stands for its stages of the same values, else for all of them."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Key -> values: a stage for each combination, named NAME-VALUE-VALUE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """A pipeline file."""

    folder: str = "???"
    """Where the pipeline keeps which stages are done."""
    stages: list[StageConfig] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One command."""

    name: str
    words: tuple[str, ...]
    """What follows `mmscale`."""
    after: tuple[str, ...]
    """Names of stages, all of them earlier in the list."""


def load_pipeline(path: Path, words: Sequence[str] = ()) -> tuple[Path, list[Stage]]:
    """Read a pipeline file.

    Returns:
        Its folder, and its stages in an order in which each comes after those that it needs.

    Raises:
        ConfigError: an unknown key, a name twice or unknown, stages that wait for each other, braces without a value.
    """
    config = configfile.load(PipelineConfig, path, words)
    need(bool(config.stages), f"{path} has no `stages`. Give it at least one with a name and a command.")
    names = [stage.name for stage in config.stages]
    for name in names:
        need(_NAME.fullmatch(name) is not None, f"`stages`: {name!r} is no name: letters, digits, '-', '_' and '.' make one.")
        need(names.count(name) == 1, f"`stages`: the name {name!r} is given twice.")
    stages = [stage for entry in config.stages for stage in _expand(entry, config)]
    expanded = [stage.name for stage in stages]
    for name in expanded:
        need(
            expanded.count(name) == 1,
            f"`stages`: two stages would be called {name!r}. Give grids values, and stages names, that differ in it.",
        )
    return Path(config.folder), _in_order(stages)


def _expand(entry: StageConfig, config: PipelineConfig) -> list[Stage]:
    """The stages of an entry: one, or one for each combination of the grid."""
    need(
        "folder" not in entry.grid,
        f"`stages`: the grid of {entry.name!r} has the key 'folder', which is the pipeline's. Call it another name.",
    )
    for key, listed in entry.grid.items():
        need(bool(listed), f"`stages`: the grid of {entry.name!r} has no value for {key!r}. Give it some, or take the key away.")
        plain = all(isinstance(value, (str, int, float)) for value in listed)
        need(plain, f"`stages`: the grid of {entry.name!r} may have numbers and texts for {key!r}; got {listed}.")
    try:
        given = shlex.split(entry.command)
    except ValueError as e:
        raise ConfigError(f"`stages`: the command of {entry.name!r} is no line of a shell: {e}. Mend its quotes.") from e
    need(bool(given), f"`stages`: {entry.name!r} has an empty command. Give it what follows `mmscale`.")
    stages = []
    for values in itertools.product(*entry.grid.values()):
        chosen = dict(zip(entry.grid, values, strict=True))
        try:
            words = [word.format(folder=config.folder, **chosen) for word in given]
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
            raise ConfigError(
                f"`stages`: the command of {entry.name!r} has braces that nothing fills: {e}. Known: folder, {', '.join(chosen)}."
            ) from e
        after = [name for needed in entry.after for name in _resolve(needed, entry, chosen, config)]
        stages.append(Stage(name=_name(entry, chosen), words=tuple(words), after=tuple(after)))
    return stages


def _resolve(needed: str, entry: StageConfig, chosen: Mapping[str, Any], config: PipelineConfig) -> list[str]:
    """The stages that a name in `after` stands for."""
    found = next((other for other in config.stages if other.name == needed), None)
    if found is None:
        known = ", ".join(other.name for other in config.stages)
        raise ConfigError(f"`stages`: {entry.name!r} is to come after {needed!r}, which is no stage. Known are {known}.")
    combinations = [dict(zip(found.grid, values, strict=True)) for values in itertools.product(*found.grid.values())]
    same = [c for c in combinations if all(c[key] == chosen[key] for key in c.keys() & chosen.keys())]
    return [_name(found, c) for c in (same or combinations)]


def _name(entry: StageConfig, chosen: Mapping[str, Any]) -> str:
    return "-".join([entry.name, *(re.sub(r"[^A-Za-z0-9_.]+", "_", str(value)) for value in chosen.values())])


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """Each after those that it needs, else as they are listed."""
    left, done = list(stages), list[Stage]()
    while left:
        ready = next((stage for stage in left if set(stage.after) <= {d.name for d in done}), None)
        if ready is None:
            raise ConfigError(f"`stages`: {', '.join(stage.name for stage in left)} wait for each other. Take one `after` away.")
        left.remove(ready)
        done.append(ready)
    return done
