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
    """Whether an objective takes its negatives from groups of consecutive positions, which must then stay together."""


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
    grouped = [o.group for o in (config.objectives.contrastive, config.objectives.matching) if o.weight > 0 and o.group is not None]
    return BatchPlan(global_batch=total, micro_batch=micro, ranks=ranks, accumulation=total // (micro * ranks), consecutive=bool(grouped))


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
    bytes_a_parameter = 4 if dtype == "float32" else 2
    lines = [
        f"batch       {plan.global_batch} samples = {plan.micro_batch} micro x {plan.ranks} ranks x {plan.accumulation} accumulation",
        f"data        {rows:,} samples; {config.train.steps:,} steps are {samples:,} samples, {samples / rows:.2f} epochs",
        f"model       {parameters:,} parameters, {trained:,} trained; {dtype}, ZeRO {config.zero.stage}",
        f"memory      about {_state_bytes(config, plan.ranks, parameters, trained, bytes_a_parameter) / 2**20:,.0f} MiB a rank for "
        "weights, gradients and optimizer",
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


def _state_bytes(config: RunConfig, ranks: int, parameters: int, trained: int, width: int) -> float:
    """Bytes of model state a rank, by ZeRO stage (Rajbhandari et al. 2020, section 5)."""
    stage = config.zero.stage
    master = 0 if width == 4 and stage == 0 else 4
    optimizer = trained * (8 + master) / (ranks if stage >= 1 else 1)
    gradients = trained * width / (ranks if stage >= 2 else 1)
    weights = parameters * width / (ranks if stage >= 3 else 1)
    average = 0 if config.train.ema_decay is None else trained * 4 / (ranks if stage >= 1 else 1)
    return optimizer + gradients + weights + average
