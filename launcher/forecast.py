"""What a stage takes on a cluster that need not exist: memory, micro-batches, communication, time, checkpoints, reading.

The model and the arithmetic of memory and operations are those of a run (`mmscale.outline`, `mmscale.memory`, `mmscale.flops`); torch is
loaded for them when a forecast is made. `launcher.assumptions` says what is taken for granted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from launcher import formulas
from launcher.assumptions import LLAMA_3, MOST_GPUS, Assumptions, mfu_range
from launcher.data_facts import DataFacts
from launcher.estimate import VOCABULARY, checkpoint_bytes
from mmscale.arithmetic import BatchPlan, plan_batch
from mmscale.config import RunConfig
from shards.configfile import need
from shards.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.engine import Trainee
    from mmscale.memory import Memory, ParameterSize

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = get_args(Stage)
Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
BF16 = 2
"""Bytes of a weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The cluster on paper."""

    gpus: int
    gpus_per_node: int

    @property
    def nodes(self) -> int:
        return self.gpus // self.gpus_per_node

    @classmethod
    def of(cls, gpus: int, gpus_per_node: int) -> Site:
        """So many GPUs; a node is not larger than the whole.

        Raises:
            ConfigError: there are none, too many, or no whole number of nodes.
        """
        need(
            1 <= gpus <= MOST_GPUS,
            f"`--gpus {gpus}` must be 1 to {MOST_GPUS:,}, as far as failure rates have a source. Give such a number.",
        )
        need(gpus_per_node >= 1, f"`--gpus-per-node {gpus_per_node}` must be at least 1.")
        a_node = min(gpus, gpus_per_node)
        need(
            gpus % a_node == 0,
            f"`--gpus {gpus}` are no whole number of nodes of {a_node} GPUs. Use {gpus // a_node * a_node} or "
            f"{(gpus // a_node + 1) * a_node}, or another --gpus-per-node.",
        )
        return cls(gpus=gpus, gpus_per_node=a_node)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageForecast:
    """One ZeRO stage, with the stage file's activation checkpointing."""

    stage: int
    micro_batch: int
    """The one of the stage file, or the largest that fits and divides the batch; 0: none does."""
    mfu: tuple[float, float]
    """Lower and upper."""
    accumulation: int
    memory: dict[str, float]
    """Bytes a rank with that micro-batch (with 1 where none fits), by part."""
    device_bytes: float
    """Their sum on the device."""
    fits: dict[str, int]
    """Largest micro-batch that fits under accumulation, by kind of activation checkpointing."""
    paper_bytes: float
    """Sent by a rank in a step by the ZeRO paper, without accumulation."""
    sent_bytes: float
    """Sent by a rank in a step as DeepSpeed 0.19.8 does it, with the contrastive exchange."""
    communication_s: float
    step_s: tuple[float, float]
    """Shortest and longest, by the range of MFU; of no meaning where nothing fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """All of it. Ranges are (lowest, highest) time."""

    run: str
    site: Site
    parameters: int
    trained: int
    global_batch: int
    stage: int
    recompute: str
    usable_bytes: float
    text_tokens: int
    tokens_a_sample: int
    flops_a_sample: float
    """Forward and backward."""
    stages: list[StageForecast]
    chosen: StageForecast
    """That of the stage file's zero.stage."""
    steps: int
    samples_per_s: tuple[float, float]
    """Lowest first."""
    tokens_per_s: tuple[float, float]
    days: tuple[float, float]
    """Of the steps alone."""
    checkpoint_bytes: int
    savings: dict[str, formulas.Saving]
    """By the source of the failure rate."""
    days_in_all: tuple[float, float]
    """With saves, failures and restarts: the shortest with the rarer failures, the longest with the assumed ones."""
    read_bytes_per_s: float
    """Of all nodes, at the highest rate."""
    facts: DataFacts
    assumptions: Assumptions


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What the parts of a forecast share."""

    config: RunConfig
    site: Site
    assumptions: Assumptions
    trainee: Trainee
    sizes: Sequence[ParameterSize]
    counts: Any
    """Function from a micro-batch to its counts."""

    @property
    def usable_bytes(self) -> float:
        return self.assumptions.hardware.memory_gb * formulas.GB * self.assumptions.hardware.usable_memory

    @property
    def a_rank(self) -> int:
        """Samples of a rank in a step."""
        return self.config.train.global_batch // self.site.gpus

    def memory(self, stage: Stage, recompute: Recompute, micro_batch: int, accumulation: int) -> Memory:
        """The run's own arithmetic, for a CUDA device in bf16."""
        from mmscale.memory import Kernels, activations, gathered, with_state, workspace

        shape, counts, kernels = self.trainee.model.config, self.counts(micro_batch), Kernels(width=BF16, cuda=True)
        zero = replace(self.config.zero, stage=stage, offload_optimizer=self.config.zero.offload_optimizer if stage else "none")
        plan = BatchPlan(global_batch=0, micro_batch=micro_batch, ranks=self.site.gpus, accumulation=accumulation)
        work = workspace(shape, counts, kernels, recompute)
        work = max(work, gathered(shape, counts, self.site.gpus, self.config.objectives.contrastive.group))
        kept = activations(shape, counts, kernels, recompute)
        return with_state(self.sizes, replace(self.config, zero=zero), plan, BF16, kept, work)

    def largest(self, stage: Stage, recompute: Recompute) -> int:
        """The largest micro-batch that fits while gradients are accumulated."""
        return formulas.largest(lambda micro: self.memory(stage, recompute, micro, 2).device <= self.usable_bytes)

    def chosen(self, stage: Stage, recompute: Recompute, most: int) -> BatchPlan | None:
        """The batch as the stage file divides it, or with the largest micro-batch that fits and divides; None where there is none."""
        if self.config.train.micro_batch is not None:
            return plan_batch(self.config, self.site.gpus)
        whole = self._divided(self.a_rank)
        if whole is not None and self.memory(stage, recompute, self.a_rank, 1).device <= self.usable_bytes:
            return whole
        smaller = (micro for micro in range(min(most, self.a_rank - 1), 0, -1) if self.a_rank % micro == 0)
        return next((plan for micro in smaller if (plan := self._divided(micro)) is not None), None)

    def _divided(self, micro: int) -> BatchPlan | None:
        try:
            return plan_batch(replace(self.config, train=replace(self.config.train, micro_batch=micro)), self.site.gpus)
        except ConfigError:  # a group of negatives that this one does not hold
            return None


def forecast(config: RunConfig, site: Site, assumptions: Assumptions, facts: DataFacts) -> Forecast:
    """Work it all out.

    Args:
        config: the stage.
        site: the cluster on paper.
        assumptions: what is taken for granted.
        facts: what is known of the data.

    Raises:
        ConfigError: a global batch that does not divide, fp32, a model that cannot be built.
    """
    need(config.train.precision != "fp32", "`train.precision=fp32` has no forecast: peaks and MFU are of bf16. Set it to auto or bf16.")
    plan_batch(config, site.gpus)
    from mmscale.backward import Backward
    from mmscale.flops import training_flops
    from mmscale.memory import parameter_sizes
    from mmscale.outline import Typical, outline

    trainee = outline(config, facts.vocabulary or VOCABULARY, len(config.data.labels or ()) or assumptions.sample.labels)
    typical = Typical.of(config, trainee, facts.text_tokens)
    sizes = parameter_sizes(trainee, config.optimizer)
    desk = Desk(
        config=config, site=site, assumptions=assumptions, trainee=trainee, sizes=sizes, counts=lru_cache(maxsize=64)(typical.counts)
    )
    stage, recompute = config.zero.stage, config.model.activation_checkpointing
    plan = desk.chosen(stage, recompute, desk.largest(stage, recompute))
    micro = plan.micro_batch if plan else 1
    counts = desk.counts(micro)
    flops = training_flops(trainee.model.config, counts, Backward.of(trainee.model)) / micro
    stages = [_stage(desk, number, flops) for number in STAGES if config.optimizer.fits(number)]
    chosen = next(found for found in stages if found.stage == stage)
    low, high = chosen.step_s
    train = config.train
    saved = checkpoint_bytes(sizes, config, BF16)
    stall_s = assumptions.storage.fixed_s + saved / (assumptions.storage.write_gb_s_node * formulas.GB * site.nodes)
    failures = assumptions.failures
    rates = {"failures.hours": (failures.gpus * failures.hours, high), "Llama 3": (LLAMA_3[0] * LLAMA_3[1], low)}
    savings = {
        name: formulas.best_saving(stall_s, gpu_hours / site.gpus, step_s, failures.restart_minutes)
        for name, (gpu_hours, step_s) in rates.items()
    }
    tokens = (counts.perceived + counts.texts.tokens) // micro
    days = (train.steps * low / 86400, train.steps * high / 86400)
    lost = sorted(saving.lost for saving in savings.values())
    return Forecast(
        run=config.run,
        site=site,
        parameters=sum(s.numel for s in sizes),
        trained=sum(s.numel for s in sizes if s.trained),
        global_batch=train.global_batch,
        stage=stage,
        recompute=recompute,
        usable_bytes=desk.usable_bytes,
        text_tokens=facts.text_tokens,
        tokens_a_sample=tokens,
        flops_a_sample=flops,
        stages=stages,
        chosen=chosen,
        steps=train.steps,
        samples_per_s=(train.global_batch / high, train.global_batch / low),
        tokens_per_s=(tokens * train.global_batch / high, tokens * train.global_batch / low),
        days=days,
        checkpoint_bytes=saved,
        savings=savings,
        days_in_all=(days[0] * (1 + lost[0]), days[1] * (1 + lost[-1])),
        read_bytes_per_s=facts.sample_bytes * train.global_batch / low,
        facts=facts,
        assumptions=assumptions,
    )


def _stage(desk: Desk, stage: Stage, flops: float) -> StageForecast:
    """The forecast of one stage."""
    config, site, hardware = desk.config, desk.site, desk.assumptions.hardware
    recompute = config.model.activation_checkpointing
    fits: dict[str, int] = {kind: desk.largest(stage, kind) for kind in RECOMPUTE}
    plan = desk.chosen(stage, recompute, fits[recompute])
    micro, accumulation = (plan.micro_batch, plan.accumulation) if plan else (1, max(1, desk.a_rank))
    memory = desk.memory(stage, recompute, micro, accumulation)
    if memory.device > desk.usable_bytes:
        plan = None
    parameters, trained = sum(s.numel for s in desk.sizes), sum(s.numel for s in desk.sizes if s.trained)
    paper, real = formulas.stage_numbers(stage, parameters, trained, accumulation)
    contrastive = config.objectives.contrastive
    crosses = contrastive.weight > 0 and (contrastive.group is None or micro % contrastive.group)
    pairs = formulas.pair_bytes(micro, site.gpus, config.model.projection_size, accumulation) if crosses else 0.0
    sent = formulas.on_the_wire(real, BF16, site.gpus) + pairs
    bandwidth = formulas.GB * (hardware.inter_node_gb_s if site.nodes > 1 else hardware.intra_node_gb_s)
    key = "mfu_stage_3" if stage == 3 else "mfu"
    mfu = mfu_range(getattr(hardware, key), config.model.hidden_size, key)
    a_rank = flops * config.train.global_batch / site.gpus / (hardware.peak_teraflops * 1e12)
    times = [formulas.step_seconds(a_rank / part, sent / bandwidth, overlaps=stage == 3) for part in reversed(mfu)]
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace", "host")
    return StageForecast(
        stage=stage,
        micro_batch=micro if plan else 0,
        mfu=mfu,
        accumulation=accumulation,
        memory={name: float(getattr(memory, name)) for name in names},
        device_bytes=memory.device,
        fits=fits,
        paper_bytes=formulas.on_the_wire(paper, BF16, site.gpus),
        sent_bytes=sent,
        communication_s=sent / bandwidth,
        step_s=(times[0], times[1]),
    )
