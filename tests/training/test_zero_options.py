"""Offloaded optimizer state and ZeRO 3's prefetching: the same losses, kept over a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mmscale.config import ZeroConfig
from mmscale.engine import zero_options
from shards.errors import ConfigError
from tests.training.runs import losses, write_stage
from tests.training.test_exact_resume import check
from tests.training.test_parity import difference, run_grid

CPU = torch.device("cpu")
VARIANTS = {
    "zero1": "zero.stage=1",
    "zero1-offload": "zero.stage=1 zero.offload_optimizer=cpu",
    "zero2-offload": "zero.stage=2 zero.offload_optimizer=cpu",
    "zero3": "zero.stage=3",
    "zero3-offload": "zero.stage=3 zero.offload_optimizer=cpu",
    "zero3-sharded": "zero.stage=3 zero.persistence_threshold=0 zero.prefetch_bucket=2000 zero.reduce_bucket=5000",
    "zero3-late": "zero.stage=3 zero.persistence_threshold=0 zero.prefetch_bucket=0 model.activation_checkpointing=selective",
    "zero3-ahead": "zero.stage=3 zero.persistence_threshold=0 model.activation_checkpointing=selective",
    "plain": "zero.stage=2 model.dropout=0",
    "compiled": "zero.stage=2 model.dropout=0 train.compile=true",  # which draws other numbers for dropout
}
FEW = ["zero1", "zero1-offload", "zero3-ahead"]


@pytest.mark.parametrize("names", [FEW, pytest.param(list(VARIANTS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_losses_are_those_without_on_two_ranks(tmp_path: Path, glyphs: Path, names: list[str]) -> None:
    stage = write_stage(tmp_path, glyphs)
    names = [name for name in names if name != "compiled" or shutil.which("g++")]
    run_grid(2, stage, tmp_path / "runs", [f"{name} {VARIANTS[name]}" for name in names])
    assert len(losses(tmp_path / "runs" / "zero1")) == 12
    same = {"compiled": "plain", "plain": "plain"}
    differences = {name: difference(tmp_path / "runs", same.get(name, "zero1"), name) for name in names}
    assert max(differences.values()) < 1e-5, differences


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_killed_run_with_offloaded_state_continues_bit_for_bit(tmp_path: Path, glyphs: Path, zero: int) -> None:
    check(
        tmp_path,
        glyphs,
        zero=zero,
        workers=0,
        steps=20,
        kills=1,
        extra=("zero.offload_optimizer=cpu", "train.ema_decay=0.9", "train.micro_batch=4"),
    )


def test_deepspeed_is_told_what_the_stage_uses() -> None:
    assert zero_options(ZeroConfig(stage=1), 1000, CPU) == {"stage": 1, "reduce_bucket_size": 1000}
    assert zero_options(ZeroConfig(stage=1, reduce_bucket=70), 1000, CPU)["reduce_bucket_size"] == 70
    options = zero_options(ZeroConfig(stage=3, prefetch_bucket=7, persistence_threshold=8, offload_optimizer="cpu"), 9, CPU)
    assert options["stage3_prefetch_bucket_size"] == 7
    assert options["stage3_param_persistence_threshold"] == 8
    assert options["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ZeroConfig(stage=0, offload_optimizer="cpu"), "`zero.offload_optimizer=cpu` needs a sharded optimizer; got zero.stage = 0"),
        (ZeroConfig(reduce_bucket=0), "`zero.reduce_bucket` must be at least 1; got 0"),
        (ZeroConfig(prefetch_bucket=-1), "`zero.prefetch_bucket` must not be negative; got -1"),
        (ZeroConfig(persistence_threshold=-1), "`zero.persistence_threshold` must not be negative; got -1"),
    ],
)
def test_what_cannot_work_is_refused(config: ZeroConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check()
    assert message in str(caught.value)
