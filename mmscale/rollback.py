"""Loss spikes: telling them from noise, going back to the last commit, and passing over the steps that led there.

A run is a pure function of its configuration and of the steps that it passes over, so a roll back needs no more than their list, which is
kept in rollbacks.jsonl. A step that is passed over trains on nothing: its positions stay its own, and every later step has those that it
always had.

Source of the way: Chowdhery et al. 2022 (PaLM), section 5.1, who went back to a checkpoint and skipped the batches around the spike.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mmscale.errors import NoProgressError, RunError
from mmscale.recovery_config import GuardConfig
from mmscale.run_folder import RunFolder, append_line, drop_torn_line, read_lines

logger = logging.getLogger(__name__)
MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation (Rousseeuw and Croux 1993)."""
LEAST_DEVIATION = 0.01
"""Of the median: losses that hardly move make no spike of a little."""


class LossSpike(Exception):  # noqa: N818  (nobody's mistake: the run is rolled back)
    """The loss of a step that stands out.

    Args:
        step: steps done, the spike's included.
        loss: of that step, over all ranks.
        limit: what it is above.
    """

    def __init__(self, step: int, loss: float, limit: float) -> None:
        super().__init__(f"the loss of step {step} is {loss:.4g}, above {limit:.4g}")
        self.step, self.loss, self.limit = step, loss, limit


class LossWindow:
    """The losses of the newest steps.

    Args:
        length: how many.
        factor: deviations above the median that make a spike.
        losses: to begin with, oldest first.
    """

    def __init__(self, length: int, factor: float, losses: Iterable[float] = ()) -> None:
        self.losses = deque(losses, maxlen=length)
        self._factor = factor

    def limit(self) -> float | None:
        """What a loss must not be above; None while there are too few to tell."""
        if len(self.losses) < (self.losses.maxlen or 0):
            return None
        middle = statistics.median(self.losses)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(x - middle) for x in self.losses)
        return middle + self._factor * max(deviation, LEAST_DEVIATION * abs(middle))

    def look(self, step: int, loss: float) -> LossSpike | None:
        """Take a step's loss in, unless it is a spike."""
        limit = self.limit()
        if limit is not None and loss > limit:
            return LossSpike(step, loss, limit)
        self.losses.append(loss)
        return None


@dataclass(frozen=True, slots=True)
class Rollback:
    """A line of rollbacks.jsonl."""

    step: int
    """Where the spike was, in steps done."""
    loss: float
    limit: float
    back_to: int
    """Step of the checkpoint that was gone back to; 0 where there was none yet."""
    skipped_steps: list[int]
    """Steps that are passed over from then on, in steps done."""
    positions: list[list[int]]
    """First position of each, and the first after it."""


def steps_passed_over(folder: RunFolder, group: dist.ProcessGroup) -> frozenset[int]:
    """Read which steps a run does not train on, counted in steps done (all ranks call)."""
    found: list[Any] = [_read(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0, group=group)
    return frozenset(step for rollback in found[0] for step in rollback.skipped_steps)


def roll_back(folder: RunFolder, config: GuardConfig, spike: LossSpike, newest: int, global_batch: int, group: dist.ProcessGroup) -> None:
    """Write down what a spike leads to: the step itself and the one trained before it are passed over from now on (all ranks call).

    Args:
        folder: of the run.
        config: how many spikes may come from one checkpoint.
        spike: what was seen.
        newest: step of the newest good checkpoint; 0 for none.
        global_batch: samples a step.
        group: gloo group of all ranks.

    Raises:
        NoProgressError: the run was rolled back to this checkpoint too often.
        RunError: there is no checkpoint; the run has to be started anew.
    """
    earlier: list[Any] = [_read(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(earlier, src=0, group=group)
    rollbacks: list[Rollback] = earlier[0]
    before = sum(r.back_to == newest for r in rollbacks)
    where = f"the checkpoint of step {newest}" if newest else "its start"
    if before >= config.max_rollbacks:
        raise NoProgressError(
            f"In step {spike.step}, {spike}: the median of the {config.spike_window} losses before and guard.spike = {config.spike:g} "
            f"deviations. The run was rolled back to {where} {before} times already, and guard.max_rollbacks = {config.max_rollbacks}. "
            f"What was passed over is in {folder.rollbacks}. Go on with a lower optimizer.lr or train.clip_norm, or a higher guard.spike."
        )
    over = {step for r in rollbacks for step in r.skipped_steps}
    trained = [s for s in range(spike.step - 1, newest, -1) if s not in over]
    skipped = sorted({*trained[:1], spike.step})
    if dist.get_rank() == 0:
        positions = [[(s - 1) * global_batch, s * global_batch] for s in skipped]
        drop_torn_line(folder.rollbacks)
        line = {"step": spike.step, "loss": spike.loss, "limit": spike.limit, "back_to": newest}
        append_line(folder.rollbacks, line | {"skipped_steps": skipped, "positions": positions})
    words = ", ".join(map(str, skipped))
    logger.warning("LOSS SPIKE: %s; back to %s, without the positions of steps %s", spike, where, words)
    if not newest:
        raise RunError(
            f"In step {spike.step}, {spike}, and there is no checkpoint to roll back to. The same command starts anew without the "
            f"positions of steps {words}. Set `checkpoint.every`."
        )


def _read(folder: RunFolder) -> list[Rollback]:
    return [Rollback(**line) for line in read_lines(folder.rollbacks)]
