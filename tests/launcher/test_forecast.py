"""What `mmscale plan` works out: formulas against numbers by hand, memory against the run's own estimate."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.assumptions import MOST_GPUS, load_assumptions, mfu_range
from launcher.data_facts import DataFacts, data_facts
from launcher.forecast import STAGES, Desk, Forecast, Site, forecast
from launcher.forecast_command import render
from launcher.formulas import best_saving, largest, on_the_wire, pair_bytes, stage_numbers, step_seconds
from mmscale.arithmetic import BatchPlan
from mmscale.config import CONFIGS, RunConfig, load_run_config
from mmscale.flops import named_peak
from mmscale.memory import estimate, parameter_sizes
from mmscale.outline import Typical, outline
from shards.errors import ConfigError
from tests.shards.tars import make_data_set

PAIRS = CONFIGS / "pretrain" / "pairs.yaml"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RECORDED = [
    pytest.param(gpu, step, id=f"{gpu}-{step['size']}-{step['stage']}-{'compiled' if step['compile'] else 'plain'}")
    for gpu, name in (("h100", "gpu.json"), ("h200", "gpu-h200.json"))
    for step in json.loads((RESULTS / name).read_text())["steps"]
]


def stage_of(*words: str) -> RunConfig:
    return load_run_config(PAIRS, ["data.shards=/nowhere", *words])


@cache
def predicted(*words: str, gpus: int = 8, set_words: tuple[str, ...] = (), gpu: str = "h100") -> Forecast:
    config, assumptions = stage_of(*words), load_assumptions(gpu, set_words)
    return forecast(config, Site.of(gpus, 8), assumptions, data_facts(config, assumptions))


SMALL = ("model=tiny", "train.global_batch=1024")


@pytest.mark.parametrize(
    ("stage", "accumulation", "expected"),
    [(0, 4, (20, 20)), (1, 4, (20, 30)), (2, 1, (20, 30)), (2, 4, (20, 90)), (3, 1, (30, 30)), (3, 4, (30, 120))],
)
def test_numbers_sent_are_those_of_the_paper_and_of_deepspeed(stage: int, accumulation: int, expected: tuple[float, float]) -> None:
    assert stage_numbers(stage, parameters=10, trained=10, accumulation=accumulation) == expected


def test_stage_three_gathers_frozen_weights_and_scatters_no_gradients_of_theirs() -> None:
    assert stage_numbers(3, parameters=10, trained=4, accumulation=1) == (24, 24)


def test_formulas_by_hand() -> None:
    assert on_the_wire(100, width=2, ranks=4) == 150
    assert on_the_wire(100, width=2, ranks=1) == 0
    assert pair_bytes(micro_batch=3, ranks=5, projection=10, accumulation=2) == 2 * 4 * 3 * (80 + 24)
    assert step_seconds(3, 2, overlaps=False) == 5
    assert step_seconds(3, 2, overlaps=True) == 3
    saving = best_saving(stall_s=2, mttf_hours=1, step_s=3, restart_minutes=6)
    assert saving.interval_s == 120  # sqrt(2 x 2 x 3600)
    assert saving.every == 40
    assert saving.lost == pytest.approx(2 / 120 + (60 + 360) / 3600)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 17, 64, 65, 500])
def test_largest_is_the_last_that_fits(most: int) -> None:
    assert largest(lambda n: n <= most, limit=100) == min(most, 100)


def test_model_state_shrinks_with_the_stage_and_parts_add_up() -> None:
    found = predicted(*SMALL).stages
    state = [sum(stage.memory[part] for part in ("weights", "gradients", "optimizer")) for stage in found]
    assert state == sorted(state, reverse=True)
    assert len(set(state)) == len(state)
    for stage in found:
        assert stage.device_bytes == pytest.approx(sum(stage.memory.values()))


def desk_of(config: RunConfig, gpus: int, set_words: tuple[str, ...] = ()) -> Desk:
    trainee = outline(config, 1000)
    counts = Typical.of(config, trainee, 20).counts
    site, assumptions = Site.of(gpus, 8), load_assumptions("h100", set_words)
    return Desk(
        config=config, site=site, assumptions=assumptions, trainee=trainee, sizes=parameter_sizes(trainee, config.optimizer), counts=counts
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_micro_batch_that_fits_is_the_largest(recompute: Any) -> None:
    desk = desk_of(stage_of(*SMALL), 8, ("hardware.memory_gb=0.5",))
    for stage in STAGES:
        micro = desk.largest(stage, recompute)
        assert micro > 1
        assert desk.memory(stage, recompute, micro, 2).device <= desk.usable_bytes < desk.memory(stage, recompute, micro + 1, 2).device


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_memory_is_what_the_run_estimates(stage: Any, accumulation: int) -> None:
    config = stage_of(*SMALL, f"zero.stage={stage}")
    desk = desk_of(config, 8)
    plan = BatchPlan(global_batch=1024, micro_batch=16, ranks=8, accumulation=accumulation)
    theirs = estimate(desk.trainee, config, plan, torch.bfloat16, torch.device("cuda"), [desk.counts(16)])
    assert desk.memory(stage, "none", 16, accumulation) == theirs


@pytest.mark.parametrize(("gpu", "recorded"), RECORDED)
def test_what_was_measured_is_what_is_predicted(gpu: str, recorded: dict[str, Any]) -> None:
    micro, kind = recorded["micro_batch"], recorded["activation_checkpointing"]
    words = (f"model={recorded['size']}", f"train.global_batch={micro}", f"zero.stage={recorded['stage']}")
    found = predicted(*words, f"model.activation_checkpointing={kind}", gpus=1, gpu=gpu).chosen
    assert found.micro_batch == micro
    assert found.device_bytes / 2**20 == pytest.approx(recorded["memory_mib"], rel=0.07)
    low, high = found.step_s
    assert 0.8 * low < recorded["step_ms"] / 1000 < 1.25 * high


def test_batch_is_divided_without_a_remainder_by_the_largest_micro_batch_that_fits() -> None:
    found = predicted("model=base", "train.global_batch=32768", gpus=8)
    for stage in found.stages:
        assert stage.micro_batch * 8 * stage.accumulation == 32768
        assert stage.micro_batch <= stage.fits["none"] < 2 * stage.micro_batch
    assert found.chosen.step_s[0] < found.chosen.step_s[1]
    assert found.days[1] == pytest.approx(found.steps * found.chosen.step_s[1] / 86400)


def test_failures_scale_with_the_gpus() -> None:
    savings = [predicted(*SMALL, gpus=gpus).savings["failures.hours"].mttf_hours for gpus in (8, 1024)]
    assert savings == pytest.approx([7.9 * 128, 7.9])


def test_more_than_fits_is_said_and_what_helps() -> None:
    found = predicted("model=large", "train.global_batch=8", set_words=("hardware.memory_gb=4",))
    assert found.chosen.micro_batch == 0
    assert "No micro-batch that divides the batch fits under zero.stage=1" in render(found)


def test_a_stage_that_the_optimizer_refuses_is_no_choice() -> None:
    assert [found.stage for found in predicted(*SMALL).stages] == [0, 1, 2, 3]
    assert [found.stage for found in predicted(*SMALL, "optimizer.name=muon").stages] == [0, 1, 2]


def test_everything_assumed_is_printed_with_its_source() -> None:
    text = render(predicted(*SMALL, set_words=("failures.hours=20",)))
    assert "hardware.peak_teraflops   989.0" in text
    assert "NVIDIA H100 data sheet, dense" in text
    assert "failures.hours            20 on 1,024 GPUs, scaled by 1 / GPUs    given" in text
    assert "measured on one H100, benchmarks/results/gpu.json" in text


def test_manifest_says_what_a_sample_takes(tmp_path: Path) -> None:
    make_data_set(tmp_path)
    config, assumptions = stage_of(), load_assumptions("h100")
    config = replace(config, data=replace(config.data, shards=str(tmp_path)))
    known = data_facts(config, assumptions)
    assert known.samples is not None
    assert known.sources["sample.bytes"] == f"manifest of {tmp_path}"
    given = data_facts(config, load_assumptions("h100", ["sample.bytes=7", "sample.text_tokens=9", "sample.vocabulary=11"]))
    assert (given.sample_bytes, given.text_tokens, given.vocabulary) == (7, 9, 11)


@pytest.mark.parametrize("part", sorted(p.stem for p in (CONFIGS / "hardware").glob("*.yaml")))
def test_hardware_parts_have_the_peaks_that_the_run_counts_with_and_sources(part: str) -> None:
    found = load_assumptions(part)
    assert found.hardware.peak_teraflops * 1e12 == named_peak(part.upper(), torch.bfloat16)
    assert all(found.source(f"hardware.{key}") for key in ("memory_gb", "intra_node_gb_s", "inter_node_gb_s", "mfu", "mfu_stage_3"))


def test_mfu_is_that_of_the_width_below() -> None:
    widths = {128: [0.01, 0.02], 768: [0.2, 0.3]}
    assert [mfu_range(widths, width, "mfu") for width in (64, 128, 767, 768, 4096)] == [(0.01, 0.02)] * 3 + [(0.2, 0.3)] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Site.of(0, 8), "`--gpus 0` must be 1 to 16,384"),
        (lambda: Site.of(MOST_GPUS + 8, 8), "`--gpus 16392` must be 1 to 16,384"),
        (lambda: Site.of(12, 8), "`--gpus 12` are no whole number of nodes of 8 GPUs. Use 8 or 16, or another --gpus-per-node."),
        (lambda: Site.of(8, 0), "`--gpus-per-node 0` must be at least 1"),
        (lambda: load_assumptions("h1000"), "`--gpu h1000` names no known GPU: they are a100, b200, h100, h200."),
        (lambda: load_assumptions("h100", ["mfu=0.3"]), "`--set mfu` names no assumption: they begin with hardware."),
        (
            lambda: load_assumptions("h100", ["hardware.mfu=0.3"]),
            "`hardware.mfu` must be a lower and an upper fraction such as [0.22,0.27]",
        ),
        (lambda: load_assumptions("h100", ["failures.hours=0"]), "`failures.hours` must be more than 0; got 0"),
        (
            lambda: predicted("train.global_batch=1000", gpus=16),
            "`train.global_batch` must divide by the ranks, 16; got 1000. Use 992 or 1008.",
        ),
        (lambda: predicted("train.precision=fp32"), "`train.precision=fp32` has no forecast"),
    ],
)
def test_what_cannot_be_is_one_paragraph(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_facts_hold_what_is_not_known() -> None:
    config = stage_of()
    facts = data_facts(config, load_assumptions("h100"))
    assert isinstance(facts, DataFacts)
    assert (facts.samples, facts.vocabulary, facts.text_tokens, facts.sample_bytes) == (None, None, 34, 25_000)
