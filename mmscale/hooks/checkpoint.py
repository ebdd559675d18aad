"""Commits a checkpoint every so many steps, at the end, and on request."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch

from mmscale.assemble import Run, run_state
from mmscale.checkpoint.commit import STATE, commit
from mmscale.checkpoint.model_folder import AVERAGE, MODEL, write_model
from mmscale.checkpoint.state import write_state
from mmscale.errors import RunError
from mmscale.hooks import StepInfo, due
from mmscale.lora import merged
from mmscale.run_folder import fsync
from mmscale.weights import whole_parameters

logger = logging.getLogger(__name__)


class CheckpointHook:
    """Runs last: what the other hooks wrote of a step is on file when the step is committed."""

    def __init__(self, run: Run, quarantined: int) -> None:
        self.run = run
        self.quarantined = quarantined

    def after_step(self, info: StepInfo) -> None:
        """Commit when a checkpoint is due (all ranks call)."""
        self.quarantined += info.sums.quarantined
        config = self.run.config.checkpoint
        if not due(info.step, config.every, info.last):
            return
        self._check_finite(info)
        start = time.perf_counter()
        state = run_state(self.run, step=info.step, samples_seen=info.samples_seen, quarantined=self.quarantined)

        def extra(attempt: Path) -> list[Path]:
            first = self.run.world.is_first
            return write_models(self.run, attempt) + _write_average(self.run, attempt) + ([write_state(attempt, state)] if first else [])

        folder = commit(self.run.folder.checkpoints, info.step, self.run.engine, self.run.group, extra, keep=config.keep)
        logger.info("committed %s in %.1f s", folder, time.perf_counter() - start)

    def close(self) -> None:
        """Nothing is held open."""

    def _check_finite(self, info: StepInfo) -> None:
        norm = self.run.engine.get_global_grad_norm()
        if norm is not None and not math.isfinite(float(norm)):
            raise RunError(
                f"Step {info.step}: the gradient norm is {float(norm)}; nothing was committed. Go on from the last checkpoint with a lower "
                "optimizer.lr, train.clip_norm or with train.precision=fp32."
            )


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
