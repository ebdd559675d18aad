"""The estimate of memory against what is there: storages counted one by one, on the CPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.arithmetic import BatchPlan
from mmscale.config import RunConfig, TrainConfig, ZeroConfig
from mmscale.counts import count
from mmscale.engine import Trainee, build_engine
from mmscale.memory import Kernels, Memory, activations, estimate, workspace
from mmscale.model.sequences import Wanted
from tests.model.live import Live
from tests.model.streams import GRIDS, MODALITIES, NATIVE, stream_batch
from tests.model.test_forward import total
from tests.model.tiny import all_objectives, make_batch, random_rows, tiny_model
from tests.objectives.ranks import run_ranks

SHAPE = {"image_size": 32, "max_text_tokens": 60}
CASES = [
    {"unimodal_layers": 3, "fusion_layers": 3, "hidden_size": 64},
    {"unimodal_layers": 2, "fusion_layers": 1, "hidden_size": 128},
    {"unimodal_layers": 3, "fusion_layers": 3, "hidden_size": 64, "qk_norm": False},
    {"unimodal_layers": 3, "fusion_layers": 1, "hidden_size": 64, "head_pooling": "concat"},
    {"unimodal_layers": 3, "fusion_layers": 3, "hidden_size": 64, "dropout": 0.1},
    {"unimodal_layers": 3, "fusion_layers": 3, "hidden_size": 64, "activation_checkpointing": "full"},
    {"unimodal_layers": 2, "fusion_layers": 2, "hidden_size": 128, "activation_checkpointing": "selective"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_activations_are_those_that_autograd_keeps(case: dict[str, Any], dtype: torch.dtype) -> None:
    model, objectives = tiny_model(**SHAPE, **case).to(dtype), all_objectives()
    batch = make_batch(random_rows(24, longest=40), image_size=32)
    counts = count(model.config, batch, Wanted.of(objectives))
    with Live(*model.parameters()) as live:
        loss = total(model, batch, objectives)
        kept, live.peak = live.bytes(), 0
        loss.backward()
    kernels, recompute = Kernels(width=dtype.itemsize, cuda=False), str(model.config.activation_checkpointing)
    expected = activations(model.config, counts, kernels, recompute)
    assert expected == pytest.approx(kept, rel=0.05)
    assert expected + workspace(model.config, counts, kernels, recompute) == pytest.approx(live.peak, rel=0.1)


ITEMS = [
    {"modalities": {**MODALITIES, "audio": {**MODALITIES["audio"], "stem": 4}}, "head_pooling": "concat"},
    {"modalities": NATIVE},
    {"modalities": MODALITIES, "positions": "rotary"},
    {"modalities": NATIVE, "positions": "rotary", "qk_norm": False},
    {"modalities": NATIVE, "activation_checkpointing": "selective"},
    {"positions": "rotary"},
    {"positions": "rotary", "qk_norm": False},
    {"image": {"leading_tokens": 2}, "text": {"hidden_size": 32, "num_heads": 1, "layers": 3}},
    {"image": {"convolution": True}, "text": {"convolution": True}},
    {"image": {"convolution": True}, "activation_checkpointing": "selective"},
]


@pytest.mark.parametrize("case", ITEMS, ids=str)
def test_activations_of_items_of_every_modality_are_estimated(case: dict[str, Any]) -> None:
    model, objectives = tiny_model(unimodal_layers=3, fusion_layers=3, hidden_size=64, **case), all_objectives()
    rows, grids = random_rows(24, longest=20), {name: [g for g in of for _ in range(3)] for name, of in GRIDS.items()}
    batch = stream_batch(model, rows, grids)
    if not model.modalities:
        batch = make_batch(rows)
        batch.kept_NK, batch.patch_mask_NP = torch.tensor([0, 2, 3]).expand(24, -1), batch.patch_mask_NP[:, :3]
    counts = count(model.config, batch, Wanted.of(objectives))
    with Live(*model.parameters()) as live:
        loss = total(model, batch, objectives)
        kept, live.peak = live.bytes(), 0
        loss.backward()
    kernels, recompute = Kernels(width=4, cuda=False), str(model.config.activation_checkpointing)
    expected = activations(model.config, counts, kernels, recompute)
    assert expected == pytest.approx(kept, rel=0.03)
    assert expected + workspace(model.config, counts, kernels, recompute) == pytest.approx(live.peak, rel=0.1)


def peaks(rank: int, ranks: int, cases: list[tuple[int, str]]) -> list[tuple[int, Memory]]:
    """Bytes alive at the fullest moment of a second step, and the estimate, of each stage and kind of checkpointing."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo", verbose=False)
    return [peak(rank, ranks, stage, recompute) for stage, recompute in cases]


def peak(rank: int, ranks: int, stage: int, recompute: str) -> tuple[int, Memory]:
    """One case."""
    config = RunConfig(train=TrainConfig(global_batch=8 * ranks, precision="fp32"), zero=ZeroConfig(stage=stage))
    plan = BatchPlan(global_batch=8 * ranks, micro_batch=8, ranks=ranks, accumulation=1)
    device, objectives = torch.device("cpu"), all_objectives(task=False)
    batch = make_batch(random_rows(8, seed=rank, longest=20), first=8 * rank, image_size=32)
    with Live() as live:
        model = tiny_model(**SHAPE, hidden_size=256, num_heads=4, activation_checkpointing=recompute)
        trainee = Trainee(model, objectives)
        engine = build_engine(trainee, config, plan, torch.float32, device)
        for _ in range(2):
            live.peak = 0
            loss, _, _ = engine(batch, torch.full((len(objectives),), 0.01))
            engine.backward(loss * ranks, scale_wrt_gas=False)
            del loss
            engine.step()
    counts = [count(model.config, batch, Wanted.of(objectives))]
    expected = estimate(trainee, config, plan, torch.float32, device, counts)
    engine.destroy()
    del engine, trainee, model
    gc.collect()
    return live.peak, expected


@pytest.mark.slow
def test_the_whole_is_what_a_step_needs_on_two_ranks(tmp_path: Path) -> None:
    cases = [(0, "none"), (1, "none"), (2, "none"), (2, "full"), (3, "none"), (3, "selective")]
    for found in run_ranks(peaks, 2, tmp_path, cases):
        ratios = {case: round(expected.device / used, 3) for case, (used, expected) in zip(cases, found, strict=True)}
        assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def memory(**parts: float) -> Memory:
    names = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace", "host")
    return Memory(**dict.fromkeys(names, 0.0) | parts)


def test_it_is_printed_and_warns_where_the_device_has_less() -> None:
    found = memory(weights=3 * 2**20, activations=2**20, host=2**20)
    assert found.device == 4 * 2**20
    (line,) = found.lines(5 * 2**20)
    assert line.startswith("memory      about 4 MiB a rank: weights 3, gradients 0")
    assert line.endswith("; on the host 1 MiB")
    _, warning = found.lines(2**20)
    assert "the device has 1 MiB, less than the estimate: lower train.micro_batch" in warning
    assert len(found.lines(None)) == 1


def test_a_packed_kernel_keeps_no_padding() -> None:
    model, objectives = tiny_model(**SHAPE, fusion_layers=4), all_objectives()
    counts = count(model.config, make_batch(random_rows(24, longest=40), image_size=32), Wanted.of(objectives))
    assert counts.upper.slots > counts.upper.tokens
    assert counts.upper.prefix + counts.upper.rest == counts.upper.tokens
    packed, padded = (activations(model.config, counts, Kernels(width=2, cuda=cuda), "none") for cuda in (True, False))
    assert packed < padded
