"""`mmscale plan`: makes a forecast and prints it as a table, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from launcher.assumptions import Assumptions, load_assumptions
from launcher.data_facts import data_facts
from launcher.estimate import VOCABULARY
from launcher.forecast import Forecast, Site, StageForecast, forecast
from mmscale.config import load_run_config

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace")


def plan(
    config: str, words: Sequence[str], gpus: int, gpus_per_node: int, gpu: str, assumption_words: Sequence[str], *, as_json: bool = False
) -> int:
    """Print what a stage takes on a cluster that need not exist.

    Returns:
        1 when no micro-batch fits under the stage file's ZeRO stage, else 0.

    Raises:
        ConfigError: a configuration, a cluster or an assumption that cannot be.
    """
    loaded, site, assumptions = load_run_config(config, words), Site.of(gpus, gpus_per_node), load_assumptions(gpu, assumption_words)
    found = forecast(loaded, site, assumptions, data_facts(loaded, assumptions))
    if as_json:
        print(json.dumps(asdict(found), indent=1, default=sorted))
    else:
        print(render(found))
    return int(found.chosen.micro_batch == 0)


def render(found: Forecast) -> str:
    """The tables, what follows from them, and what was taken for granted."""
    site, name = found.site, found.assumptions.hardware.name
    head = f"{site.gpus:,} x {name} in {site.nodes:,} nodes of {site.gpus_per_node}; global batch {found.global_batch:,}; bf16"
    return "\n".join(
        [
            f"cluster     {head}",
            f"model       {found.parameters:,} parameters, {found.trained:,} trained",
            f"sample      {found.tokens_a_sample:,} tokens, {found.flops_a_sample / 1e9:,.1f} GFLOP forward and backward",
            *_memory(found),
            *_steps(found),
            *(_run(found) if found.chosen.micro_batch else [_no_fit(found)]),
            *_assumed(found),
        ]
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return ["", title, *lines]


def _mark(found: Forecast, stage: StageForecast) -> str:
    return f"{'*' if stage.stage == found.stage else ' '}{stage.stage}"


def _memory(found: Forecast) -> list[str]:
    kinds = list(found.chosen.fits)
    head = ["ZeRO", "micro", *PARTS, "sum", "host", *(f"fits: {kind}" for kind in kinds)]
    rows = []
    for stage in found.stages:
        parts = [f"{stage.memory[part] / GIB:.2f}" for part in PARTS]
        totals = [f"{stage.device_bytes / GIB:.2f}", f"{stage.memory['host'] / GIB:.2f}"]
        rows.append([_mark(found, stage), str(stage.micro_batch or "none"), *parts, *totals, *(f"{stage.fits[kind]:,}" for kind in kinds)])
    title = (
        f"memory a rank in GiB, of {found.usable_bytes / GIB:.1f} that may be used, with activation checkpointing {found.recompute}; "
        "and the largest micro-batch that fits"
    )
    return _table(title, head, rows)


def _steps(found: Forecast) -> list[str]:
    head = ["ZeRO", "batch = micro x ranks x accumulation", "paper GB", "sent GB", "sent s", "step s"]
    rows = []
    for stage in found.stages:
        if stage.micro_batch:
            batch = f"{found.global_batch:,} = {stage.micro_batch:,} x {found.site.gpus:,} x {stage.accumulation:,}"
            step = _range(stage.step_s, ".3g")
        else:
            batch, step = "nothing fits that divides it", "-"
        sent = [f"{stage.paper_bytes / 1e9:.2f}", f"{stage.sent_bytes / 1e9:.2f}", f"{stage.communication_s:.3f}"]
        rows.append([_mark(found, stage), batch, *sent, step])
    return _table("a step: bytes that a rank sends by the ZeRO paper and as DeepSpeed 0.19.8 does it, and the time", head, rows)


def _run(found: Forecast) -> list[str]:
    lines = ["", f"the run, under ZeRO {found.stage}"]
    chosen, stall_s = found.chosen, next(iter(found.savings.values())).stall_s
    lines.append(f"set         train.micro_batch={chosen.micro_batch}: accumulation {chosen.accumulation}")
    lines.append(f"rate        {_range(found.samples_per_s, ',.0f')} samples/s, {_range(found.tokens_per_s, ',.3g')} tokens/s")
    epochs = "" if found.facts.samples is None else f" ({found.steps * found.global_batch / found.facts.samples:.2f} epochs)"
    lines.append(
        f"time        {found.steps:,} steps, {found.steps * found.global_batch:,} samples{epochs}: {_days(found.days)}; "
        f"{_days(found.days_in_all)} with saves, failures and restarts"
    )
    micro_s = chosen.step_s[0] / chosen.accumulation
    if micro_s < SHORT_S:
        lines.append(
            f"warning     {micro_s * 1000:.0f} ms a micro-step: below some {SHORT_S * 1000:.0f} ms work on the host takes the time "
            "(docs/speed.md), and steps take longer than this; use fewer GPUs or a larger train.global_batch"
        )
    lines.append(f"checkpoint  {found.checkpoint_bytes / GIB:.2f} GiB, {stall_s:.2f} s to write")
    for name, saving in found.savings.items():
        lines.append(
            f"            a failure every {saving.mttf_hours:.3g} h ({name}): save every {saving.interval_s:,.0f} s, "
            f"checkpoint.every={saving.every}; {saving.lost:.1%} of the time is lost"
        )
    nodes = found.site.nodes
    reading = f"{found.read_bytes_per_s / 1e9:.3g} GB/s of shards over all nodes, {found.read_bytes_per_s / nodes / 1e6:,.3g} MB/s a node"
    lines.append(f"reading     up to {reading}")
    return lines


def _no_fit(found: Forecast) -> str:
    return (
        f"\nNo micro-batch that divides the batch fits under zero.stage={found.stage} with model.activation_checkpointing={found.recompute}"
        ". Raise zero.stage, set model.activation_checkpointing=full, lower train.micro_batch, or use a GPU with more memory."
    )


def _assumed(found: Forecast) -> list[str]:
    """Every number that was taken for granted, with its source."""
    assumptions, facts = found.assumptions, found.facts
    values = {f"hardware.{key}": getattr(assumptions.hardware, key) for key in HARDWARE}
    values |= {
        "hardware.mfu": _range(found.stages[0].mfu, "g"),
        "hardware.mfu_stage_3": _range(found.stages[-1].mfu, "g"),
        "sample.bytes": f"{facts.sample_bytes:,.0f}",
        "sample.text_tokens": facts.text_tokens,
        "sample.vocabulary": facts.vocabulary or VOCABULARY,
        "storage.write_gb_s_node": assumptions.storage.write_gb_s_node,
        "storage.fixed_s": assumptions.storage.fixed_s,
        "failures.hours": f"{assumptions.failures.hours:g} on {assumptions.failures.gpus:,} GPUs, scaled by 1 / GPUs",
        "failures.restart_minutes": assumptions.failures.restart_minutes,
    }
    lines = ["", "assumed (--set KEY=VALUE changes it)"]
    lines += [f"  {key:<26}{value!s:<38}  {_source(assumptions, found, key)}" for key, value in values.items()]
    return [*lines, *(f"  {line}" for line in NOTES)]


def _source(assumptions: Assumptions, found: Forecast, key: str) -> str:
    return found.facts.sources.get(key) or assumptions.source(key)


def _days(days: tuple[float, float]) -> str:
    return f"{_range(days, '.3g')} days" if days[1] >= 2 else f"{_range((days[0] * 24, days[1] * 24), '.3g')} hours"


def _range(values: tuple[float, float], form: str) -> str:
    low, high = (format(value, form) for value in values)
    return low if low == high else f"{low} to {high}"


SHORT_S = 0.2
"""Shorter micro-steps wait for the host (docs/speed.md)."""
HARDWARE = ("memory_gb", "usable_memory", "peak_teraflops", "intra_node_gb_s", "inter_node_gb_s")
NOTES = (
    "Memory, operations: mmscale/memory.py, mmscale/flops.py, the model's own shapes; a sample has all modalities and texts of the mean.",
    "Paper: Rajbhandari et al. 2020, section 7: 2 Psi for ZeRO 0 to 2, 3 Psi for 3. Sent: with accumulation and contrastive pairs.",
    "Step: FLOPs over peak x MFU, and sending at the slowest link's bandwidth; ZeRO 3 overlaps the two, 0 to 2 do not.",
    "Saves: every sqrt(2 x stall x MTTF), Young 1974; the stall is a save in the foreground.",
    "Llama 3: 466 interruptions in 54 days on 16,384 H100 (Grattafiori et al. 2024, section 3.3.4), scaled by 1 / GPUs.",
)
