"""Counted operations against torch's own count of what ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmscale.flops import forward_flops, peak_flops
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

NAMES = ["contrastive", "matching", "masked_language", "captioning", "masked_image", "classify"]


def counted(model, batch, objectives) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch, objectives)
    return counter.get_total_flops()


@pytest.mark.parametrize("layers", [(2, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_counted_operations_are_those_that_run(name: str, layers: tuple[int, int]) -> None:
    model = tiny_model(unimodal_layers=layers[0], fusion_layers=layers[1], hidden_size=64)
    rows = [Row(caption=r.caption, text=r.caption, label=r.label) for r in random_rows(6, longest=4)]
    rows += [Row(caption=None, text=None, label=1), Row(image=False)]
    objectives = [o for o in all_objectives() if name in ("all", o.name)]
    batch = make_batch(rows)
    assert forward_flops(model.config, batch, objectives) == pytest.approx(counted(model, batch, objectives), rel=0.06)


@pytest.mark.parametrize(
    "towers",
    [
        {"text": {"hidden_size": 32, "num_heads": 1, "layers": 3}, "image": {"leading_tokens": 2}},
        {"text": {"captions": "bidirectional"}, "image": {"leading_tokens": 0, "pooling": "attention", "layers": 1}},
    ],
)
def test_towers_of_other_shapes_are_counted(towers: dict[str, dict[str, Any]]) -> None:
    model = tiny_model(hidden_size=64, **towers)
    rows = [Row(caption=r.caption, text=r.caption, label=r.label) for r in random_rows(6, longest=4)]
    batch, objectives = make_batch([*rows, Row(caption=None, text=None, label=1)]), all_objectives()
    assert forward_flops(model.config, batch, objectives) == pytest.approx(counted(model, batch, objectives), rel=0.06)


def test_no_sample_is_no_operation() -> None:
    assert forward_flops(tiny_model().config, make_batch([]), all_objectives()) == 0


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None
