"""Commits a checkpoint every so many steps, at the end, and on request."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from mmscale.assemble import Run, run_state
from mmscale.checkpoint.commit import STATE, commit
from mmscale.checkpoint.model_folder import AVERAGE, MODEL, write_model
from mmscale.checkpoint.state import write_state
from mmscale.errors import RunError
from mmscale.hooks import StepInfo, due
from mmscale.hooks.guard import GuardHook
from mmscale.lora import merged
from mmscale.run_folder import fsync
from mmscale.weights import whole_parameters

logger = logging.getLogger(__name__)


class CheckpointHook:
    """Runs last: what the other hooks wrote of a step is on file when the step is committed."""

    def __init__(self, run: Run, quarantined: int, guard: GuardHook) -> None:
        self.run = run
        self.guard = guard
        self.quarantined = quarantined

    def after_step(self, info: StepInfo) -> None:
        """Commit when a checkpoint is due (all ranks call).

        Raises:
            RunError: too many steps were skipped; raised once the state, which is that of the last good step, is committed.
        """
        self.quarantined += info.sums.quarantined
        config = self.run.config.checkpoint
        if not due(info.step, config.every, info.last or self.guard.failure is not None):
            return
        self.guard.settle()
        start = time.perf_counter()
        state = run_state(
            self.run,
            step=info.step,
            samples_seen=info.samples_seen,
            quarantined=self.quarantined,
            skipped=self.guard.total,
            skipped_in_a_row=self.guard.in_a_row,
        )

        def extra(attempt: Path) -> list[Path]:
            first = self.run.world.is_first
            return write_models(self.run, attempt) + _write_average(self.run, attempt) + ([write_state(attempt, state)] if first else [])

        folder = commit(self.run.folder.checkpoints, info.step, self.run.engine, self.run.group, extra, keep=config.keep)
        logger.info("committed %s in %.1f s", folder, time.perf_counter() - start)
        if self.guard.failure is not None:
            raise RunError(self.guard.failure)

    def close(self) -> None:
        """Nothing is held open."""


def write_models(run: Run, attempt: Path) -> list[Path]:
    """Write model/, and ema/ where an average is kept, in the transformers layout (all ranks call)."""
    first, model, config = run.world.is_first, run.trainee.model, run.trainee.model.config
    lora, tokenizer = run.config.lora, run.tokenizer_folder
    files = write_model(attempt / MODEL, config, merged(whole_parameters(run.engine, model), lora), tokenizer, write=first)
    if run.average is not None:
        files += write_model(attempt / AVERAGE, config, merged(run.average.whole(), lora), tokenizer, write=first)
    return files


def _write_average(run: Run, attempt: Path) -> list[Path]:
    """Write this rank's part of the moving average, to go on from."""
    if run.average is None:
        return []
    path = average_path(attempt, run.world.rank)
    torch.save(run.average.state_dict(), path)
    fsync(path)
    return [path]


def average_path(folder: Path, rank: int) -> Path:
    """Where a rank keeps its part of the moving average."""
    return folder / STATE / f"ema_rank_{rank}.pt"
