"""Which checkpoints are kept. Only what a later commit has made superfluous is ever deleted."""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path

from mmscale.checkpoint.find import committed, step_of
from mmscale.config import CheckpointConfig
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


def superfluous(folders: list[Path], config: CheckpointConfig, scores: dict[int, float]) -> list[Path]:
    """List the checkpoints that no rule keeps.

    Args:
        folders: the committed ones, oldest first.
        config: the rules.
        scores: step -> value of `checkpoint.best` there; the highest is the best.
    """
    if config.keep == 0:
        return []
    scored = [f for f in folders if step_of(f) in scores]
    best = max(scored, key=lambda f: scores[step_of(f)], default=None)
    kept = {f for f in folders if is_pinned(f) or f == best or (config.keep_every and step_of(f) % config.keep_every == 0)}
    return [f for f in folders[: -config.keep] if f not in kept]


def retain(run: RunFolder, config: CheckpointConfig) -> None:
    """Delete the checkpoints that no rule keeps: renamed first, so that no half-deleted one is ever found."""
    records = read_lines(run.evaluations) if config.best else ()
    best = config.best or ""
    scores = {r["step"]: float(r[best]) for r in records if r.get(best) is not None}  # null: undefined there
    for folder in superfluous(committed(run.checkpoints), config, scores):
        trash = folder.with_name(f".trash-{folder.name}.{secrets.token_hex(4)}")
        folder.rename(trash)
        shutil.rmtree(trash)
        logger.info("deleted the checkpoint of step %d", step_of(folder))
