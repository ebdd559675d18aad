"""Batches that set out a step ahead are those that are waited for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmscale.data.batch import Batch
from mmscale.data.loader import StepBatch
from mmscale.data.transfer import Transfer
from tests.data.test_loader import B, M, assert_same_steps, folder, loader  # noqa: F401


def tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    batch.each(found.append)
    return found


def taken(folder: Path, *, ahead: bool, seen: int = 0, device: str = "cpu") -> tuple[list[StepBatch], int]:  # noqa: F811
    """All steps, and how many micro-batches had been taken from the feed when the second step was handed out."""
    steps, work = [], 0
    end = time.monotonic() + 60
    with loader(folder, seen=seen, steps=seen // B + 6, prefetch=2 * (B // M), device=torch.device(device)) as opened:
        opened.transfer.ahead = ahead
        for step in opened:
            steps.append(step)
            while opened.feed is not None and opened.feed.ready() < 2 * (B // M) and len(steps) < 3:
                assert time.monotonic() < end
                time.sleep(0.001)  # until the next two steps lie ready
            if len(steps) == 2:
                work = opened.statistics().samples
    return steps, work


@pytest.mark.parametrize("seen", [0, 2 * B])
def test_steps_that_set_out_ahead_are_the_same(folder: Path, seen: int) -> None:  # noqa: F811
    (plain, before), (early, after) = taken(folder, ahead=False, seen=seen), taken(folder, ahead=True, seen=seen)
    assert_same_steps(plain, early)
    assert after == before + B


def test_on_a_cpu_nothing_is_copied(folder: Path) -> None:  # noqa: F811
    steps, _ = taken(folder, ahead=False)
    transfer = Transfer(torch.device("cpu"))
    assert not transfer.ahead
    assert transfer.start(steps[0].host).arrived()[0] is steps[0].host[0]
    assert steps[0].micro[0] is steps[0].host[0]


@pytest.mark.gpu
def test_the_device_gets_what_the_host_has(folder: Path) -> None:  # noqa: F811
    steps, _ = taken(folder, ahead=True, device="cuda")
    for step in steps:
        for host, device in zip(step.host, step.micro, strict=True):
            for mine, theirs in zip(tensors(host), tensors(device), strict=True):
                assert theirs.is_cuda
                assert torch.equal(mine, theirs.cpu())
