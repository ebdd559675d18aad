"""Going on from a copy in an object store where the run folder has no checkpoint as new: each rank fetches its share of the files."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mmscale.checkpoint import manifest
from mmscale.checkpoint.commit import find_lack, remove_leftovers
from mmscale.checkpoint.copies import Copies, Copy
from mmscale.checkpoint.find import name_of, step_of
from mmscale.checkpoint.retention import PINNED
from mmscale.errors import CheckpointError
from mmscale.run_folder import fsync, replace_file
from shards.errors import MmscaleError, ShardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A copy that the ranks fetch together."""

    copy: Copy
    text: str
    """Of its manifest."""
    entries: list[manifest.FileEntry]
    folder: Path
    """Where its files go."""


def fetch_newer(copies: Copies, checkpoints: Path, newest: Path | None, group: dist.ProcessGroup) -> Path | None:
    """Bring the newest whole copy into the run folder, if it is newer than what is there (all ranks call).

    A copy that is damaged is named and set aside, and the one before it is taken.

    Args:
        copies: of the run.
        checkpoints: folder of the run's checkpoints.
        newest: the newest good one there.
        group: gloo group of all ranks.

    Returns:
        The newest checkpoint, committed in the run folder; the same on every rank.

    Raises:
        CheckpointError: the store cannot be read, or there is no room: to start from something older would be no one's wish.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    candidates: list[Copy] | None = None

    def begin() -> _Attempt | None:
        nonlocal candidates
        if candidates is None:
            candidates = [c for c in copies.found() if c.is_whole and c.step > (step_of(newest) if newest else -1)]
        return _begin(copies, candidates, checkpoints)

    while True:
        attempt = _on_first(copies, begin, group)
        if attempt is None:
            return newest
        outcomes: list[Any] = [None] * ranks
        dist.all_gather_object(outcomes, _fetch(copies, attempt, rank, ranks), group=group)
        if errors := [error for _, error in outcomes if error is not None]:
            raise _refusal(copies, errors[0])
        fault = next((f for f, _ in outcomes if f is not None), None)
        if _on_first(copies, partial(_end, copies, attempt, fault, checkpoints), group):
            return checkpoints / name_of(attempt.copy.step)


def _on_first(copies: Copies, action: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """Do something on rank 0; all ranks get its result, or raise its error (all ranks call)."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except (MmscaleError, OSError) as e:
            told[1] = str(e)
    dist.broadcast_object_list(told, src=0, group=group)
    if told[1] is not None:
        raise _refusal(copies, told[1])
    return told[0]


def _refusal(copies: Copies, error: str) -> CheckpointError:
    return CheckpointError(
        f"The copies of this run's checkpoints in {copies.root} cannot be gone on from: {error} Mend it, or go on from the run folder "
        "alone with checkpoint.copy_to=null."
    )


def _begin(copies: Copies, candidates: list[Copy], checkpoints: Path) -> _Attempt | None:
    """Take the newest candidate whose manifest is sound off the list, and make its folder; None where none is left."""
    while candidates:
        copy = candidates.pop()
        try:
            text, entries = copies.manifest_of(copy)
        except CheckpointError as e:
            _set_aside(copies, copy, str(e))
            continue
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoints)
        if (lack := find_lack(checkpoints, sum(e.size for e in entries), len(entries))) is not None:
            raise CheckpointError(f"{lack}.")
        folder = checkpoints / f".tmp-{name_of(copy.step)}.{secrets.token_hex(4)}"
        folder.mkdir()
        logger.info("fetching the checkpoint of step %d from %s/%s", copy.step, copies.root, copy.name)
        return _Attempt(copy, text, entries, folder)
    return None


def _fetch(copies: Copies, attempt: _Attempt, rank: int, ranks: int) -> tuple[str | None, str | None]:
    """Fetch this rank's share: what is wrong with the copy, and what kept it from being fetched."""
    entries = sorted(attempt.entries, key=lambda e: (-e.size, e.path))[rank::ranks]
    try:
        return copies.fetch(attempt.copy, entries, attempt.folder), None
    except (MmscaleError, OSError) as e:
        return None, str(e)


def _end(copies: Copies, attempt: _Attempt, fault: str | None, checkpoints: Path) -> bool:
    """Commit what was fetched, as any checkpoint, or say what is wrong with it and remove it.

    Returns:
        Whether it was committed.
    """
    replace_file(attempt.folder / manifest.NAME, attempt.text)
    fault = fault or manifest.find_fault(attempt.folder, hashes=False)  # hashed on the way, and by tensor once it is loaded
    if fault is not None:
        _set_aside(copies, attempt.copy, fault)
        shutil.rmtree(attempt.folder)
        return False
    if attempt.copy.is_pinned:
        (attempt.folder / PINNED).touch()
    for folder in (attempt.folder, *(p for p in attempt.folder.rglob("*") if p.is_dir())):
        fsync(folder)
    final = checkpoints / name_of(attempt.copy.step)
    if final.exists():  # it has no manifest, or it would be the newest
        final.rename(final.with_name(f".trash-{final.name}.{secrets.token_hex(4)}"))
    attempt.folder.rename(final)
    fsync(checkpoints)
    return True


def _set_aside(copies: Copies, copy: Copy, fault: str) -> None:
    """Say that a copy is damaged, and mark it as that where the store lets us."""
    logger.warning("the copy %s/%s is damaged: %s. The one before it is used.", copies.root, copy.name, fault)
    try:
        copies.set_aside(copy, fault)
    except ShardError as e:
        logger.warning("it could not be marked as damaged, and will be tried again at the next start: %s", e)
