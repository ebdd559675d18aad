"""The last step of writing: once every shard is committed, whoever sees that first sums up the whole.

All of it is a function of the committed shards, so it may be done twice, or at the same time, or again after a kill.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shards.commit import commit_file, gathering, remove_leftovers
from shards.config import WriteConfig
from shards.errors import ShardError
from shards.index import build_manifest
from shards.manifest import MANIFEST_NAME, Manifest, read_manifest, sidecar_path
from shards.plan import Plan, shard_name
from shards.shard_writer import FILTERED_FOLDER, QUARANTINE_FOLDER, filtered_path, quarantine_path
from shards.vocabulary import TOKENIZER_FOLDER, write_tokenizer

QUARANTINE_NAME = "quarantine.jsonl"
FILTERED_NAME = "filtered.jsonl"


def missing_shards(out: Path, plan: Plan) -> int:
    """Count the shards of the plan that nobody has committed yet, from one listing of the folder."""
    present = set(os.listdir(out))  # noqa: PTH208  (names alone: there may be a million)
    names = (shard_name(number) for number in range(plan.shards))
    return sum(not {name, sidecar_path(Path(name)).name} <= present for name in names)


def finish(out: Path, plan: Plan, config: WriteConfig) -> Manifest:
    """Write what sums up the shards: the lists of refused samples, the manifest, the tokenizer; then clean up.

    Raises:
        ShardError: a shard is damaged, or holds no text for the tokenizer that is asked for.
    """
    _join(out / QUARANTINE_NAME, plan, quarantine_path)
    if config.filter != type(config.filter)():
        _join(out / FILTERED_NAME, plan, filtered_path)
    manifest = finished_manifest(out, plan) or build_manifest(out)
    if len(manifest.shards) != plan.shards:
        raise ShardError(f"{str(out)!r} holds {len(manifest.shards)} tars, its plan {plan.shards} shards. Move the other tars away.")
    write_tokenizer(out, manifest, config.tokenizer)
    return manifest


def clean_up(out: Path) -> None:
    """Delete what killed writers have left in a finished data set, while no other command sums it up: it would lose its own files."""
    for folder in (out, out / QUARANTINE_FOLDER, out / FILTERED_FOLDER, out / TOKENIZER_FOLDER):
        remove_leftovers(folder, all_of_them=True)


def finished_manifest(out: Path, plan: Plan) -> Manifest | None:
    """The manifest, if there is one that was made after every sidecar: nothing needs to be summed up anew."""
    path = out / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest = read_manifest(out)
    except ShardError:
        return None
    made = path.stat().st_mtime_ns
    names = [shard_name(number) for number in range(plan.shards)]
    sidecars = (sidecar_path(out / name) for name in names)
    same = [info.shard for info in manifest.shards] == names
    return manifest if same and all(sidecar.stat().st_mtime_ns <= made for sidecar in sidecars) else None


def reasons_in(path: Path) -> Counter[str]:
    """Count the lines of a list of samples by their reason."""
    counts: Counter[str] = Counter()
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            counts.update(json.loads(line)["reason"] for line in lines)
    return counts


def _join(path: Path, plan: Plan, part_of: Callable[[Path, str], Path]) -> None:
    """Write the lists of all shards into one, in the order of the shards, without holding them."""
    with gathering(path) as written:
        with written.open("wb") as file:
            for part in _existing([part_of(path.parent, shard_name(number)) for number in range(plan.shards)]):
                file.write(part.read_bytes())
        commit_file(written, path)


def _existing(paths: Sequence[Path]) -> Iterator[Path]:
    present = set(os.listdir(paths[0].parent)) if paths and paths[0].parent.is_dir() else set()  # noqa: PTH208
    return (path for path in paths if path.name in present)
