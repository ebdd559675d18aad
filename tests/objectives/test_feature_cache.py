"""Negatives of the global batch: several micro-batches give the loss and the gradients of one, on one rank and on two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.config import LoraConfig, RunConfig
from mmscale.data.batch import Batch
from mmscale.lora import add_adapters
from mmscale.model import MMScaleModel
from mmscale.model_config import ModelConfig
from mmscale.objectives import Objective, feature_cache
from mmscale.objectives.captioning import Captioning
from mmscale.objectives.contrastive import Contrastive, side_of
from mmscale.objectives.feature_cache import Collector, Replayed, collect, replay, wanted
from mmscale.objectives.masked_image import MaskedImage
from tests.model.streams import GRIDS, MODALITIES, NATIVE, stream_batch
from tests.model.tiny import Row, make_batch, random_rows, tiny_model
from tests.objectives.ranks import run_ranks

ROWS = [*random_rows(3), Row(image=False), *random_rows(4, seed=1), Row(image=False), Row(caption=None), *random_rows(2, seed=2)]
"""Twelve samples: quarters of three hold 3, 2, 2 and 2 pairs."""
HEARD = [replace(row, image=False) for row in random_rows(8)]
"""Beside the items of `GRIDS`."""
GLOBAL = Contrastive(weight=1.0, negatives="global")
OTHERS: list[Objective] = [Captioning(weight=1.0), MaskedImage(weight=1.0)]


def forward_of(model: MMScaleModel) -> feature_cache.Forward:
    def forward(index: int, batch: Batch, objectives: Sequence[Objective]) -> None:
        torch.manual_seed(index)
        model(batch, objectives)

    return forward


def gradients(micro: list[Batch], model: MMScaleModel | None = None) -> dict[str, Any]:
    """Losses and gradients of micro-batches one after the other, with the negatives of all."""
    model, totals = model or tiny_model(), {}
    contrastive: list[Objective] = [GLOBAL] * len(micro)
    if wanted([GLOBAL], len(micro)):
        contrastive = [*replay(collect(forward_of(model), micro, [GLOBAL, *OTHERS], 0.0), 1.0)]
    for index, (batch, objective) in enumerate(zip(micro, contrastive, strict=True)):
        torch.manual_seed(index)
        terms = model(batch, [objective, *OTHERS])
        torch.stack([t.sum for t in terms.values()]).sum().backward()
        for name, term in terms.items():
            totals[name] = totals.get(name, 0.0) + term.sum.item()
    return {"losses": totals, "grads": {n: p.grad for n, p in model.named_parameters()}}


def on_rank(rank: int, ranks: int, micro: int) -> dict[str, Any]:
    size = len(ROWS) // (ranks * micro)
    firsts = [(a * ranks + rank) * size for a in range(micro)]
    return gradients([make_batch(ROWS[f : f + size], first=f) for f in firsts])


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (1, 4), (2, 2)])
def test_equals_one_large_batch(tmp_path: Path, ranks: int, micro: int) -> None:
    expected = gradients([make_batch(ROWS)])
    parts = run_ranks(on_rank, ranks, tmp_path, micro) if ranks > 1 else [on_rank(0, 1, micro)]
    assert_sum(parts, expected)


def assert_sum(parts: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Losses and gradients of the parts sum up to what is expected."""
    for name, loss in expected["losses"].items():
        assert sum(p["losses"][name] for p in parts) == pytest.approx(loss, rel=1e-6)
    largest = max(g.abs().max().item() for g in expected["grads"].values())
    for name, grad in expected["grads"].items():
        worst = (sum(p["grads"][name] for p in parts) - grad).abs().max().item() / largest
        assert worst < 1e-6, (name, worst)


@pytest.mark.parametrize("kind", [MODALITIES, NATIVE], ids=["squares", "native"])
def test_samples_of_sound_and_clips_alone_have_the_negatives_of_all(kind: dict[str, Any]) -> None:
    def halves(size: int) -> list[Batch]:
        firsts = range(0, len(HEARD), size)
        return [stream_batch(model, HEARD[f : f + size], {n: g[f : f + size] for n, g in GRIDS.items()}, f) for f in firsts]

    model = tiny_model(modalities=kind)
    expected = gradients(halves(8), model)
    assert all(g is not None for g in expected["grads"].values())
    assert GLOBAL.count(halves(8)[0]) == 6  # an image and a clip; an image and sound; sound; a clip; all; a series
    model = tiny_model(modalities=kind)
    assert_sum([gradients(halves(4), model)], expected)


def test_without_the_cache_the_negatives_are_others() -> None:
    whole, model = gradients([make_batch(ROWS)]), tiny_model()
    halves = sum(model(make_batch(ROWS[f : f + 6], first=f), [GLOBAL])["contrastive"].sum.item() for f in (0, 6))
    assert abs(halves - whole["losses"]["contrastive"]) > 1.0


@pytest.mark.parametrize("of", ["layers", "adapters"])
def test_both_passes_draw_the_same_dropout(of: str) -> None:
    """The embeddings of the first pass are those of the second, with masked images and texts that only the second one reads."""
    model, batch = tiny_model(dropout=0.3 if of == "layers" else 0.0), make_batch(ROWS)
    if of == "adapters":
        add_adapters(model, LoraConfig(rank=4, dropout=0.3))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    collector = collect(forward_of(model), [batch, batch], [GLOBAL, *OTHERS], True)
    assert not torch.equal(collector.sides[0].image_ME, collector.sides[1].image_ME)
    for index, side in enumerate(collector.sides):
        second = Kept(lower={})
        torch.manual_seed(index)
        model(batch, [*OTHERS, second])
        assert torch.equal(second.sides[0].image_ME, side.image_ME)
        assert torch.equal(second.sides[0].caption_ME, side.caption_ME)


def test_adapters_drop_out_too() -> None:
    lora = [LoraConfig(rank=rank, dropout=dropout) for rank, dropout in ((0, 0.1), (4, 0.0), (4, 0.1))]
    assert [RunConfig(run="r", lora=one).drops_out() for one in lora] == [False, False, True]
    assert RunConfig(run="r", model=ModelConfig(dropout=0.1)).drops_out()


class Kept(Collector):
    """Keeps the embeddings of a forward of training."""

    def loss(self, state: Any, batch: Batch, model: MMScaleModel) -> Any:
        """Keep them."""
        self.sides.append(side_of(state, batch))
        return Collector.loss(self, state, batch, model)


def test_the_first_pass_leaves_out_what_nobody_reads() -> None:
    model, tokens = tiny_model(), []
    model.text_embedding.register_forward_hook(lambda module, args, out: tokens.append(len(out)))
    model.fusion_layers[0].register_forward_hook(lambda module, args, out: tokens.append(len(out[0]) + len(out[1])))
    batch = make_batch(ROWS)
    collect(forward_of(model), [batch], [GLOBAL, *OTHERS], 0.0)
    assert tokens == [len(batch.caption.ids_T), 0]


def test_only_global_negatives_and_accumulation_ask_for_it() -> None:
    assert wanted([*OTHERS, GLOBAL], 2) is GLOBAL
    assert wanted([GLOBAL], 1) is None
    assert wanted([Contrastive(weight=1.0)], 2) is None
    assert Replayed(part=None, weight=1.0).count(make_batch(ROWS)) == GLOBAL.count(make_batch(ROWS))  # type: ignore[arg-type]
