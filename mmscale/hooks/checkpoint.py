"""Commits a checkpoint every so many steps, at the end, and on request."""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch.distributed as dist

from mmscale.assemble import Run, run_state
from mmscale.checkpoint.background import BackgroundSave, Outcome, Snapshot
from mmscale.checkpoint.commit import Contents, commit
from mmscale.checkpoint.model_folder import write_model_files
from mmscale.checkpoint.pieces import live_state
from mmscale.checkpoint.retention import retain
from mmscale.checkpoint.state import RunState, write_state
from mmscale.errors import CheckpointError, NoProgressError, RunError
from mmscale.hooks import StepInfo, due
from mmscale.hooks.guard import GuardHook
from mmscale.hooks.spike import SpikeHook
from mmscale.signals import StopRequest
from mmscale.watchdog import Section

logger = logging.getLogger(__name__)
HOURS_OF_1024 = 7.9
"""Mean time to failure of jobs of 1,024 GPUs on Meta's research cluster; it goes with 1 / GPUs (Kokolis et al. 2024, arXiv 2410.21680)."""


class CheckpointHook:
    """Runs last: what the other hooks wrote of a step is on file when the step is committed.

    A save that fails leaves training on the checkpoint before; `checkpoint.max_failures` in a row end the run.
    """

    section: ClassVar[Section] = "save"

    def __init__(self, run: Run, quarantined: int, guard: GuardHook, spikes: SpikeHook | None, stop: StopRequest) -> None:
        self.run = run
        self.guard = guard
        self.spikes = spikes
        self.quarantined = quarantined
        self.stop = stop
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=run.config.checkpoint.timeout_s))
        self.background = BackgroundSave()
        self.snapshot = Snapshot()
        self.failures = 0
        self.first: tuple[int, float] | None = None
        self.saves = 0
        self.stalled_s = 0.0
        """What training stood still so far for checkpoints."""

    def after_step(self, info: StepInfo) -> None:
        """Commit when a checkpoint is due (all ranks call).

        Raises:
            RunError: saving has failed too often.
            NoProgressError: too many steps were skipped, raised once the state, which is that of the last good step, is committed.
            LossSpike: the run is to be rolled back; what was being saved is saved.
        """
        config = self.run.config.checkpoint
        self.quarantined += info.sums.quarantined
        self.first = self.first or (info.step, time.perf_counter())
        self._note(self.background.collect(wait=False), may_raise=False)
        last = info.last or self.guard.failure is not None
        is_due = due(info.step, config.every, last)
        self._raise_spike(settle=is_due)
        if not is_due:
            return
        self.guard.settle()
        last = last or self.guard.failure is not None
        start = time.perf_counter()
        self._note(self.background.collect(wait=True), may_raise=False)
        state = run_state(
            self.run,
            step=info.step,
            samples_seen=info.samples_seen,
            quarantined=self.quarantined,
            skipped=self.guard.total,
            skipped_in_a_row=self.guard.in_a_row,
            losses=() if self.spikes is None else list(self.spikes.window.losses),
        )
        if config.background and not last:
            contents = self._contents(state, snapshot=True)
            self.background.start(info.step, lambda: self._commit(contents))
        else:
            outcome = self._save(self._contents(state, snapshot=False))
            self._note(outcome, may_raise=True, last=last)
        stall_s = time.perf_counter() - start
        self.saves += 1
        self.stalled_s += stall_s
        self._advise(info.step, stall_s)
        if self.guard.failure is not None:
            raise NoProgressError(self.guard.failure)

    def close(self) -> None:
        """A save that still runs is not waited for: the run has failed, or the last step would have."""

    def _raise_spike(self, *, settle: bool) -> None:
        """Have the run rolled back if there was a spike (the same on all ranks)."""
        if self.spikes is None:
            return
        if settle:
            self.spikes.settle()
        if self.spikes.found is not None:
            self._note(self.background.collect(wait=True), may_raise=False)
            raise self.spikes.found

    def _contents(self, state: RunState, *, snapshot: bool) -> Contents:
        run = self.run
        live = live_state(run.engine, run.trainee.model, run.average)
        own = [p.share(run.world.rank, run.world.size) for p in live.pieces]
        pieces = [p for p in own if p.values.numel()]

        def documents(attempt: Path) -> list[Path]:
            return [*write_model_files(attempt, run.trainee.model.config, run.tokenizer_folder), write_state(attempt, state)]

        return Contents(state.step, self.snapshot.take(pieces) if snapshot else pieces, live.scalars, documents)

    def _save(self, contents: Contents) -> Outcome:
        start = time.perf_counter()
        error: CheckpointError | None = None
        try:
            self._commit(contents)
        except CheckpointError as e:
            error = e
        return Outcome(contents.step, time.perf_counter() - start, error)

    def _commit(self, contents: Contents) -> None:
        folder, copying = commit(self.run.folder.checkpoints, contents, self.group), self.run.copying
        if self.run.world.is_first:
            if copying is not None:
                copying.start(folder)
            try:
                deleted = retain(self.run.folder, self.run.config.checkpoint, copying.spared() if copying else ())
                if copying is not None:
                    copying.released.update(deleted)
            except OSError as e:  # what was to go is out of the way, or stays for the next time
                logger.warning("an old checkpoint could not be deleted: %s", e)

    def _note(self, outcome: Outcome | None, *, may_raise: bool, last: bool = False) -> None:
        """Say how a save has ended, and count failures; all ranks have the same outcome, though perhaps a step apart."""
        if outcome is None:
            return
        if outcome.error is None:
            self.failures = 0
            logger.info("committed the checkpoint of step %d in %.1f s", outcome.step, outcome.seconds)
            return
        if not isinstance(outcome.error, CheckpointError):
            raise outcome.error  # a rank is gone, or this is a fault of ours
        self.failures += 1
        most = self.run.config.checkpoint.max_failures
        logger.warning("ALERT %s (%d of %d failures in a row)", outcome.error, self.failures, most)
        if last or (may_raise and self.failures >= most):
            raise RunError(
                f"{outcome.error} It was failure {self.failures} in a row (checkpoint.max_failures = {most})."
            ) from outcome.error
        if self.failures >= most:
            self.stop.asked = True  # ranks agree on it at the next step, and try once more

    def _advise(self, step: int, stall_s: float) -> None:
        """Say once which interval would cost least, after the second save: the first one makes buffers."""
        assert self.first is not None
        steps, config = step - self.first[0], self.run.config.checkpoint
        if self.saves != 2 or steps == 0 or not self.run.world.is_first:
            return
        step_s = (time.perf_counter() - self.first[1] - self.stalled_s) / steps
        hours = mttf_hours(config.mttf_hours, self.run.world.size)
        best_s = best_interval_s(stall_s, hours * 3600)
        logger.info(
            "a checkpoint stalls training for %.2f s; with a failure every %.4g h, one every %.0f s costs least: "
            "checkpoint.every=%d (now %d)",
            *(stall_s, hours, best_s, max(1, round(best_s / max(step_s, 1e-9))), config.every),
        )


def mttf_hours(configured: float | None, ranks: int) -> float:
    """Take the configured mean time to failure, or what was measured elsewhere for so many devices."""
    return HOURS_OF_1024 * 1024 / ranks if configured is None else configured


def best_interval_s(stall_s: float, mttf_s: float) -> float:
    """Compute the time between checkpoints that costs least, sqrt(2 x stall x mean time to failure) (Young 1974, eq. 9)."""
    return math.sqrt(2 * stall_s * mttf_s)
