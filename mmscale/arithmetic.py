"""The arithmetic that follows from a configuration and a world, worked out and printed before step 0."""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config import RunConfig
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """How a global batch is divided."""

    global_batch: int
    """Samples an optimizer step."""
    micro_batch: int
    """Samples a rank takes through the model at once."""
    ranks: int
    """Ranks of the run."""
    accumulation: int
    """Micro-steps an optimizer step."""
    consecutive: bool = False
    """Whether consecutive positions must stay together: an objective takes its negatives from groups, or samples are mixed in pairs."""


def plan_batch(config: RunConfig, ranks: int) -> BatchPlan:
    """Divide `train.global_batch` over ranks and micro-steps.

    Raises:
        ConfigError: it does not divide, or a group of negatives does not fit.
    """
    total = config.train.global_batch
    if total % ranks:
        raise ConfigError(f"`train.global_batch` must divide by the ranks, {ranks}; got {total}. {_nearest(total, ranks)}")
    micro = config.train.micro_batch or total // ranks
    if total % (micro * ranks):
        raise ConfigError(
            f"`train.global_batch` must divide by micro_batch x ranks = {micro} x {ranks} = {micro * ranks}; got {total}. "
            f"{_nearest(total, micro * ranks)}"
        )
    _check_group(config, "contrastive", micro * ranks, "micro_batch x ranks")
    _check_group(config, "matching", micro, "micro_batch")
    mixes = config.data.augment.mixes
    if mixes and micro % 2:
        raise ConfigError(
            f"`data.augment.{mixes}` mixes neighbouring positions, which must lie in one micro-batch: samples a rank takes at once must be "
            f"even; got {micro}. Change train.micro_batch (or train.global_batch), or set {mixes}=0."
        )
    grouped = [o.group for o in (config.objectives.contrastive, config.objectives.matching) if o.weight > 0 and o.group is not None]
    together = mixes is not None or bool(grouped)
    return BatchPlan(global_batch=total, micro_batch=micro, ranks=ranks, accumulation=total // (micro * ranks), consecutive=together)


def _check_group(config: RunConfig, name: str, samples: int, what: str) -> None:
    objective = getattr(config.objectives, name)
    if objective.weight > 0 and objective.group is not None and samples % objective.group:
        raise ConfigError(f"`objectives.{name}.group` must divide {what} = {samples}; got {objective.group}.")


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"Use {below} or {above}." if below else f"Use {above}."


def describe(config: RunConfig, plan: BatchPlan, *, rows: int, parameters: int, trained: int, dtype: str, flops_per_sample: float) -> str:
    """Render what was derived, one fact a line.

    Args:
        rows: samples of the data set.
        parameters: parameters of the model.
        trained: parameters that are trained.
        dtype: name of the compute type.
        flops_per_sample: forward and backward FLOPs of a sample, counted on the first batch.
    """
    samples = config.train.steps * plan.global_batch
    lines = [
        f"batch       {plan.global_batch} samples = {plan.micro_batch} micro x {plan.ranks} ranks x {plan.accumulation} accumulation",
        f"data        {rows:,} samples; {config.train.steps:,} steps are {samples:,} samples, {samples / rows:.2f} epochs",
        f"model       {parameters:,} parameters, {trained:,} trained; {dtype}, ZeRO {config.zero.stage}",
        *_negatives(config, plan),
        f"compute     {flops_per_sample / 1e9:.3f} GFLOP a sample forward and backward",
    ]
    return "\n".join(lines)


def _negatives(config: RunConfig, plan: BatchPlan) -> list[str]:
    contrastive = config.objectives.contrastive
    if contrastive.weight <= 0 or contrastive.negatives == "micro":
        return []
    how = "by one more forward of the lower layers" if plan.accumulation > 1 else "in one pass: there is no accumulation"
    return [f"negatives   contrastive, from all {plan.global_batch} samples of a step, {how}"]
