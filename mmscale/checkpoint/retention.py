"""Which checkpoints are kept. Only what a later commit has made superfluous is ever deleted."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from mmscale.checkpoint.find import committed, step_of
from mmscale.recovery_config import CheckpointConfig
from mmscale.run_folder import RunFolder, fsync, read_lines

logger = logging.getLogger(__name__)
PINNED = "PINNED"
"""Empty file in a checkpoint that is never deleted. It is no part of what the manifest lists."""


def pin(folder: Path, *, pinned: bool = True) -> None:
    """Keep a checkpoint for good, or no longer."""
    if pinned:
        (folder / PINNED).touch()
    else:
        (folder / PINNED).unlink(missing_ok=True)
    fsync(folder)


def is_pinned(folder: Path) -> bool:
    """Whether a checkpoint is kept for good."""
    return (folder / PINNED).exists()


def kept(steps: Collection[int], pinned: Collection[int], config: CheckpointConfig, scores: Mapping[int, float]) -> set[int]:
    """Choose the checkpoints that a rule keeps.

    Args:
        steps: of all that there are.
        pinned: steps that are kept for good.
        config: the rules.
        scores: step -> value of `checkpoint.best` there; the highest is the best.
    """
    if config.keep == 0:
        return set(steps)
    best = max((s for s in steps if s in scores), key=lambda s: scores[s], default=None)
    regular = {s for s in steps if s == best or (config.keep_every and s % config.keep_every == 0)}
    return {*sorted(steps)[-config.keep :], *pinned, *regular}


def read_scores(run: RunFolder, config: CheckpointConfig) -> dict[int, float]:
    """Read what `checkpoint.best` was at each step that was evaluated."""
    best = config.best
    if best is None:
        return {}
    return {r["step"]: float(r[best]) for r in read_lines(run.evaluations) if r.get(best) is not None}  # null: undefined there


def retain(run: RunFolder, config: CheckpointConfig, spared: Collection[Path] = ()) -> list[int]:
    """Delete the checkpoints that no rule keeps: renamed first, so that no half-deleted one is ever found.

    Args:
        run: the run.
        config: the rules.
        spared: folders that are being read; a later call deletes them.

    Returns:
        The steps of those that were deleted.
    """
    deleted = []
    folders = committed(run.checkpoints)
    stay = kept([step_of(f) for f in folders], [step_of(f) for f in folders if is_pinned(f)], config, read_scores(run, config))
    for folder in folders:
        if step_of(folder) in stay or folder in spared:
            continue
        trash = folder.with_name(f".trash-{folder.name}.{secrets.token_hex(4)}")
        folder.rename(trash)
        shutil.rmtree(trash)
        logger.info("deleted the checkpoint of step %d", step_of(folder))
        deleted.append(step_of(folder))
    return deleted
