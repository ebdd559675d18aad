"""Counted operations against torch's own count of what ran."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmscale.backward import Backward
from mmscale.config import LoraConfig
from mmscale.counts import count
from mmscale.flops import forward_flops, named_peak, peak_flops, training_flops
from mmscale.lora import add_adapters
from mmscale.model.pairs import negative_candidates
from mmscale.model.sequences import Wanted
from mmscale.optim import freeze
from tests.model.tiny import Row, all_objectives, make_batch, random_rows, tiny_model

NAMES = ["contrastive", "matching", "masked_language", "captioning", "masked_image", "classify"]
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
MIXES = {
    "short": [*random_rows(6, longest=4), Row(caption=None, text=None, label=1), Row(image=False)],
    "ragged": random_rows(20, seed=3, longest=20),
    "texts": [Row(image=False, caption=r.caption, text=r.text) for r in random_rows(5, seed=4)],
    "images": [Row(caption=None, text=None, label=i % 3) for i in range(4)],
    "even": [Row(caption=(5 + i, 6, 7 + i), text=(5 + i, 6, 7 + i), label=i % 3) for i in range(9)] + [Row(caption=None, text=None)] * 2,
    "mixed": [*random_rows(9, seed=5, longest=12), *[Row(caption=None, text=None)] * 3, *[Row(image=False)] * 3],
}

SAME = [Row(caption=(10, 11), text=(10, 11))] * 4
OTHER = Row(caption=(11, 10), text=(11, 10))


class SeenPairs(TorchDispatchMode):
    """Sums 4 x pairs x width x heads of what attention was asked to do, twice that in its backward, the padding that it computed not."""

    def __init__(self) -> None:
        super().__init__()
        self.true = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read the mask of an attention, then run it."""
        kwargs = kwargs or {}
        if func in (ATTENTION, ATTENTION_BACKWARD):
            query, products = (args[0], 4) if func is ATTENTION else (args[1], 8)
            sequences, heads, length, width = query.shape
            mask = kwargs.get("attn_mask")
            if mask is None:
                pairs = sequences * length**2
            else:
                seen_SLL = (mask == 0).expand(sequences, 1, length, length)[:, 0]
                real_SL = torch.arange(length) < seen_SLL[:, -1].sum(-1, keepdim=True)  # the last query sees all keys that there are
                pairs = int(seen_SLL.sum(-1)[real_SL].sum())
            self.true += products * pairs * heads * width
        return func(*args, **kwargs)


def run(model: Any, batch: Any, objectives: Any, backward: bool = False) -> tuple[int, int]:
    """Operations that torch counts, padded attention replaced by the pairs that see each other; those of attention alone."""
    with SeenPairs() as seen, FlopCounterMode(display=False) as counter:
        terms = model(batch, objectives)
        if backward:
            torch.stack([t.sum for t in terms.values()]).sum().backward()
    attention = {k: v for k, v in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" in str(k)}
    return counter.get_total_flops() - sum(attention.values()) + seen.true, seen.true


@pytest.mark.parametrize("layers", [(2, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.parametrize("mix", MIXES)
def test_counted_operations_are_those_that_run(name: str, layers: tuple[int, int], mix: str) -> None:
    model = tiny_model(unimodal_layers=layers[0], fusion_layers=layers[1], hidden_size=64)
    objectives = [o for o in all_objectives() if name in ("all", o.name)]
    batch = make_batch(MIXES[mix])
    mine = forward_flops(model.config, count(model.config, batch, Wanted.of(objectives)))
    with torch.no_grad():
        theirs, _ = run(model, batch, objectives)
    if name in ("contrastive", "all"):
        theirs -= 2 * model.config.projection_size * batch.size**2  # of a metric: the nearest caption of each image
    drawn = name in ("matching", "all") and mix in ("ragged", "mixed", "short")  # texts of other lengths than the sample's own are drawn
    assert mine == pytest.approx(theirs, rel=0.1 if drawn else 0.02)


@pytest.mark.parametrize("mix", MIXES)
def test_training_is_three_forwards(mix: str) -> None:
    """Backward has two products for each of the forward's, but for what needs no gradient: the pixels and the draw of negatives."""
    model = tiny_model(hidden_size=64, unimodal_layers=3, fusion_layers=3)
    objectives = [o for o in all_objectives() if o.name != "matching"]
    batch = make_batch(MIXES[mix])
    mine = 3 * forward_flops(model.config, count(model.config, batch, Wanted.of(objectives)))
    theirs, _ = run(model, batch, objectives, backward=True)
    pixels = 2 * model.config.patch_values * 64 * model.config.patches * len(batch.image_rows_N)
    assert mine == pytest.approx(theirs + pixels, rel=0.02)


FROZEN = {
    "image tower": ["^image_(embedding|layers)"],
    "half of the image tower": ["^image_embedding", r"^image_layers\.[01]\."],
    "both towers": ["^(image|text)_(embedding|layers)"],
    "all but heads": ["_(embedding|layers)"],
    "fusion alone": ["^fusion_layers"],
    "text experts": [r"^text_", r"^fusion_layers\.\d+\.text"],
    "image experts' upper half": [r"^image_layers\.[23]\."],
}


@pytest.mark.parametrize("patterns", FROZEN.values(), ids=FROZEN)
def test_frozen_weights_have_less_of_a_backward(patterns: list[str]) -> None:
    model = tiny_model(hidden_size=64, unimodal_layers=4, fusion_layers=3)
    freeze(model, patterns)
    assert_training_counted(model)


@pytest.mark.parametrize("targets", [r".*_layers\..*\.(qkv|out)", r"fusion_layers\..*\.(qkv|out|up|down)"])
def test_adapters_leave_one_product_of_the_backward(targets: str) -> None:
    pytest.importorskip("peft")
    model = tiny_model(hidden_size=128, unimodal_layers=4, fusion_layers=3)
    add_adapters(model, LoraConfig(rank=1, targets=targets))
    assert_training_counted(model)


def assert_training_counted(model: Any) -> None:
    """Within 2 %, where patches are cut from pixels: what multiplies those has no second product."""
    objectives = [o for o in all_objectives() if o.name in ("contrastive", "masked_language", "captioning", "classify")]
    batch = make_batch(MIXES["mixed"])
    backward = Backward.of(model)
    mine = training_flops(
        model.config, count(model.config, batch, Wanted.of(objectives)), replace(backward, embeddings=backward.embeddings / 2)
    )
    theirs, _ = run(model, batch, objectives, backward=True)
    assert mine == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("group", [None, 2, 5])
@pytest.mark.parametrize("rows", [[*SAME, *MIXES["mixed"], *SAME], SAME, [*SAME, OTHER], []], ids=["mixed", "same", "two", "none"])
def test_those_with_negatives_are_counted_without_the_matrix(group: int | None, rows: list[Row]) -> None:
    batch = make_batch(rows, group=group)
    wanted = Wanted(matching=True, matching_group=group)
    counts = count(tiny_model().config, batch, wanted)
    fused = int(batch.text.fuse_S.sum())
    assert counts.pooled - fused == int(negative_candidates(batch, group).any(1).sum())


@pytest.mark.parametrize(
    "towers",
    [
        {"text": {"hidden_size": 32, "num_heads": 1, "layers": 3}, "image": {"leading_tokens": 2}},
        {"text": {"captions": "bidirectional"}, "image": {"leading_tokens": 0, "pooling": "attention", "layers": 1}},
        {"image": {"convolution": True}, "text": {"convolution": True}},
        {"head_pooling": "concat"},
    ],
)
def test_towers_of_other_shapes_are_counted(towers: dict[str, Any]) -> None:
    model = tiny_model(hidden_size=64, **towers)
    rows = [Row(caption=r.caption, text=r.caption, label=r.label) for r in random_rows(6, longest=4)]
    batch, objectives = make_batch([*rows, Row(caption=None, text=None, label=1)]), all_objectives()
    mine = forward_flops(model.config, count(model.config, batch, Wanted.of(objectives)))
    with torch.no_grad():
        theirs, _ = run(model, batch, objectives)
    assert mine == pytest.approx(theirs, rel=0.06)


def test_no_sample_is_no_operation() -> None:
    config = tiny_model().config
    assert forward_flops(config, count(config, make_batch([]), Wanted.of(all_objectives()))) == 0


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GH200 480GB", 989, 67),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        *((f"NVIDIA {name}", None, None) for name in ("GeForce GTX 1080", "RTX A4000", "RTX A1000", "RTX A3000 Laptop GPU", "T400 4GB")),
    ],
)
def test_peaks_are_found_by_the_longest_name(name: str, half: float | None, single: float | None) -> None:
    assert named_peak(name, torch.bfloat16) == (None if half is None else pytest.approx(half * 1e12))
    assert named_peak(name, torch.float32) == (None if single is None else pytest.approx(single * 1e12))
