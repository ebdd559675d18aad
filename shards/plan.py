"""The plan of a set of shards, fixed before any sample is read: which records are cut into which shard.

As the cut does not depend on what turns out to be bad, any number of processes writes the same bytes, and a repeated command
finds what an interrupted one has finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.commit import commit_first
from shards.config import WriteConfig
from shards.configfile import to_plain
from shards.errors import ConfigError
from shards.sources.record import LazyRecords, Record

PLAN_NAME = "plan.json"
PLAN_VERSION = 1
# These change nothing about the bytes of a shard.
_FREE_KEYS = ("out", "path", "processes", "quarantine", "tokenizer", "part")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard to write."""

    number: int
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """File name of the shard's tar."""
        return shard_name(self.number)


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards to write."""

    listed: Sequence[Record]
    """Samples listed by the source, good or bad; some sources make them only when they are asked for."""
    rows_per_shard: int
    config: dict[str, Any]
    """The settings that the bytes of the shards depend on."""
    listing: str
    """Digest of what the source has listed."""

    @property
    def records(self) -> int:
        """Samples listed by the source, good or bad."""
        return len(self.listed)

    @property
    def shards(self) -> int:
        """Shards that they are cut into."""
        return -(-len(self.listed) // self.rows_per_shard)

    def size(self, number: int) -> int:
        """Samples that a shard is cut from."""
        return min(self.rows_per_shard, self.records - number * self.rows_per_shard)

    def task(self, number: int) -> ShardTask:
        """Look up the records of one shard."""
        start = number * self.rows_per_shard
        return ShardTask(number, tuple(self.listed[start : start + self.rows_per_shard]))


def shard_name(number: int) -> str:
    """File name of a shard's tar."""
    return f"shard-{number:06d}.tar"


def make_plan(config: WriteConfig, records: Sequence[Record]) -> Plan:
    """Cut the listed records into shards."""
    settings = {key: value for key, value in to_plain(config).items() if key not in _FREE_KEYS}
    if config.filter.deny_file is not None:  # its words decide what is written, not its name
        digest = hashlib.sha256(Path(config.filter.deny_file).read_bytes()).hexdigest()
        settings["filter"] = {**settings["filter"], "deny_file": f"sha256 {digest}"}
    return Plan(records, config.rows_per_shard, settings, _listing_digest(records))


def enter_plan(out: Path, plan: Plan) -> None:
    """Record the plan in the output folder, or check that the folder was begun with this very plan.

    Raises:
        ConfigError: the folder holds anything else.
    """
    path = out / PLAN_NAME
    _make_folder(out)
    content = {
        "version": PLAN_VERSION,
        "records": plan.records,
        "shards": plan.shards,
        "listing": plan.listing,
        "config": plan.config,
    }
    if not path.exists():
        _check_empty(out)
        commit_first(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    _check_same(out, path, content)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"`out`: the folder {str(out)!r} cannot be made: {e.strerror}. Give another one.") from e


def _check_empty(out: Path) -> None:
    others = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
    if others and PLAN_NAME not in others:  # with it: another part has begun in this very moment
        raise ConfigError(
            f"`out`: the folder {str(out)!r} is not empty and was not begun by `mmscale shards write`: it holds {others[0]!r}. "
            "Give another `out`, or empty the folder."
        )


def _listing_digest(records: Sequence[Record]) -> str:
    if isinstance(records, LazyRecords):
        return records.digest()
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
