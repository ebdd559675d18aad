"""The plan of a set of shards, fixed before any sample is read: which records are cut into which shard.

As the cut does not depend on what turns out to be bad, any number of processes writes the same bytes, and a repeated command
finds what an interrupted one has finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.commit import commit_bytes
from shards.config import WriteConfig
from shards.configfile import to_plain
from shards.errors import ConfigError
from shards.sources.record import Record

PLAN_NAME = "plan.json"
PLAN_VERSION = 1
# These change nothing about the bytes of a shard.
_FREE_KEYS = ("out", "path", "processes", "quarantine", "tokenizer")
_LOCK_NAME = ".lock"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write."""

    number: int
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """File name of the shard's tar."""
        return f"shard-{self.number:06d}.tar"


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards to write."""

    tasks: tuple[ShardTask, ...]
    config: dict[str, Any]
    """The settings that the bytes of the shards depend on."""
    listing: str
    """Digest of what the source has listed."""

    @property
    def records(self) -> int:
        """Samples listed by the source, good or bad."""
        return sum(len(task.records) for task in self.tasks)


def make_plan(config: WriteConfig, records: Sequence[Record]) -> Plan:
    """Cut the listed records into shards."""
    size = config.rows_per_shard
    tasks = [ShardTask(number, tuple(records[start : start + size])) for number, start in enumerate(range(0, len(records), size))]
    settings = {key: value for key, value in to_plain(config).items() if key not in _FREE_KEYS}
    return Plan(tuple(tasks), settings, _listing_digest(records))


def enter_plan(out: Path, plan: Plan) -> None:
    """Record the plan in the output folder, or check that the folder was begun with this very plan.

    Raises:
        ConfigError: the folder holds anything else.
    """
    path = out / PLAN_NAME
    content = {
        "version": PLAN_VERSION,
        "records": plan.records,
        "shards": len(plan.tasks),
        "listing": plan.listing,
        "config": plan.config,
    }
    if path.exists():
        _check_same(out, path, content)
        return
    others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if others:
        raise ConfigError(
            f"`out`: the folder {str(out)!r} is not empty and was not begun by `mmscale shards write`: it holds {others[0]!r}. "
            "Give another `out`, or empty the folder."
        )
    commit_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Create the output folder and hold it against a second writer, and wait for processes that a killed one has left to end.

    Raises:
        ConfigError: another writer is at work there, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise ConfigError(f"`out`: the folder {str(out)!r} cannot be written to: {e.strerror}. Give another one.") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(f"`out`: another writer is at work in {str(out)!r}. Wait for it, or stop it.") from e
        with _folder_lock(out, fcntl.LOCK_EX):
            pass
        yield
    finally:
        os.close(lock)


def hold_folder(out: Path) -> int:
    """Mark this process as one that writes into the folder, until it ends; returns the descriptor that holds the mark."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


@contextmanager
def _folder_lock(out: Path, operation: int) -> Iterator[None]:
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def _listing_digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        line = f"{record.key}\t{record.where}\t{record.problem!r}\t{record.locator!r}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _check_same(out: Path, path: Path, content: dict[str, Any]) -> None:
    advice = "Give another `out`, or delete the folder to write it anew."
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ConfigError(f"`out`: {str(path)!r} cannot be read as a plan: {e}. {advice}") from e
    if found == content:
        return
    changes = list(_differences("", found.get("config", {}), content["config"]))
    if found.get("version") != PLAN_VERSION:
        changes = [f"the plan's version is {found.get('version')}, not {PLAN_VERSION}"]
    what = "; ".join(changes[:3]) if changes else "the source now lists other samples or files"
    raise ConfigError(f"`out`: the folder {str(out)!r} was begun with another plan: {what}. {advice}")


def _differences(prefix: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{prefix} was {old!r}, is {new!r}"
