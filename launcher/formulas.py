"""What a step sends and how long it takes, and when to save: formulas without torch, each with its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

GB = 1e9
PAIR_BYTES = 24
"""Of a sample besides its embeddings in the contrastive exchange: validity, hash and position, an int64 each."""


def stage_numbers(stage: int, parameters: float, trained: float, accumulation: int) -> tuple[float, float]:
    """Numbers that a rank sends in a step: by the paper, and by DeepSpeed 0.19.8 as this project drives it.

    Rajbhandari et al. 2020 (ZeRO), section 7: with all-reduce as reduce-scatter and all-gather of Psi numbers each, stages 0, 1 and 2 send
    2 Psi, stage 3 sends 3 Psi (weights gathered in forward and in backward, gradients scattered). DeepSpeed's stages 1 and 2 all-reduce
    their buckets where the paper scatters (`use_multi_rank_bucket_allreduce`, on by default) and gather the weights besides: 3 Psi. Under
    accumulation stage 2 reduces at every micro-step (`reduce_ready_partitions_and_remove_grads`), and stage 3 does all of its at every one.

    Args:
        stage: of ZeRO.
        parameters: Psi of what is gathered under stage 3.
        trained: Psi of what has gradients.
        accumulation: micro-steps in a step.
    """
    if stage == 3:
        each = 2 * parameters + trained
        return each, accumulation * each
    return 2 * trained, (2 * trained if stage == 0 else 2 * trained * (accumulation if stage == 2 else 1) + trained)


def on_the_wire(numbers: float, width: int, ranks: int) -> float:
    """Bytes that a rank of a ring sends: (R - 1) / R of the numbers. Source: Patarasuk and Yuan 2009; NCCL's bus bandwidth."""
    return numbers * width * (ranks - 1) / ranks


def pair_bytes(micro_batch: int, ranks: int, projection: int, accumulation: int) -> float:
    """Bytes of the contrastive exchange that a rank receives in a step: fp32 embeddings of image and caption of all other ranks.

    Source: `mmscale.objectives.sigmoid.gather_sides`.
    """
    return accumulation * (ranks - 1) * micro_batch * (2 * projection * 4 + PAIR_BYTES)


def step_seconds(compute_s: float, communication_s: float, *, overlaps: bool) -> float:
    """Time of a step: both one after the other, or the longer of the two where they overlap fully."""
    return max(compute_s, communication_s) if overlaps else compute_s + communication_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """When to save, and what saving and failing cost."""

    mttf_hours: float
    """Between two failures of the whole job."""
    stall_s: float
    """A save holds training up for so long."""
    interval_s: float
    """Between saves: what costs least."""
    every: int
    """The same in steps: checkpoint.every."""
    lost: float
    """Time lost to saves, to steps done twice and to restarts, over the time of the steps."""


def best_saving(stall_s: float, mttf_hours: float, step_s: float, restart_minutes: float) -> Saving:
    """Work out the interval that costs least, sqrt(2 x stall x MTTF). Source: Young 1974, equation 9.

    Args:
        stall_s: a save holds training up for so long.
        mttf_hours: mean time between failures of the whole job.
        step_s: of a step.
        restart_minutes: from a failure to the first new step.
    """
    mttf_s = mttf_hours * 3600
    interval_s = math.sqrt(2 * stall_s * mttf_s)
    every = max(1, round(interval_s / step_s))
    real_s = every * step_s
    lost = stall_s / real_s + (real_s / 2 + restart_minutes * 60) / mttf_s
    return Saving(mttf_hours=mttf_hours, stall_s=stall_s, interval_s=interval_s, every=every, lost=lost)


def largest(fits: Callable[[int], bool], limit: int = 1 << 16) -> int:
    """The largest number from 1 to `limit` that fits, where all below it fit too; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
