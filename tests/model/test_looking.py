"""Attention of the token that answers to the image: equal to what a sample alone computes in its own padded attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.data.batch import IGNORE
from mmscale.model import MMScaleModel, attention
from mmscale.model.looking import attention_to_images
from mmscale.objectives.captioning import Captioning
from tests.model.streams import GRIDS, MODALITIES, NATIVE, ROWS, one, stream_batch
from tests.model.tiny import Row, make_batch, tiny_model

SHOWN = [Row(), Row(text=(5, 6, 7, 8, 9)), Row(False), Row(text=None), Row(text=None, caption=None), Row(False, text=None)]
MODELS = {
    "squares": {},
    "two leading tokens": {"image": {"leading_tokens": 2}},
    "no leading token": {"image": {"leading_tokens": 0, "pooling": "attention"}},
    "beside others": {"modalities": MODALITIES},
    "native": {"modalities": NATIVE},
}


def batches(model: MMScaleModel) -> tuple[Any, list[Any]]:
    """All samples, and each alone."""
    if model.modalities:
        return stream_batch(model, masked=False), [stream_batch(model, *one(row), first=row, masked=False) for row in range(len(ROWS))]
    return make_batch(SHOWN, mask_images=False), [make_batch([row], first=i, mask_images=False) for i, row in enumerate(SHOWN)]


def weights_of(model: MMScaleModel, batch: Any, monkeypatch: pytest.MonkeyPatch, written: bool = False) -> Tensor:
    """Attention (L, L) within the one sequence of the fusion layers, mean over them and their heads."""
    found, padded = [], attention.padded_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        found.append((logits if mask is None else logits + mask).softmax(-1))
        return padded(q, k, v, mask)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "padded_attention", watched)
        if written:
            model(batch, [Captioning(weight=1.0)])
        else:
            model.classify(batch)
    return torch.stack(found[-len(model.fusion_layers) :]).mean((0, 2))[0]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_sample_looks_as_it_does_alone(kind: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(positions=positions, **MODELS[kind]).eval()
    together, alone = batches(model)
    found, leading = attention_to_images(model, together), model.config.image_tower.leading_tokens
    native = "image" in model.modalities
    leading = 1 if native else leading
    images = [i for i, grid in enumerate(GRIDS["image"]) if grid] if native else together.image_rows_N.tolist()
    assert sorted(found) == images
    for row in images:
        height, width = GRIDS["image"][row][1:] if native else (2, 2)  # type: ignore[index]
        weights_LL = weights_of(model, alone[row], monkeypatch)
        words = len(alone[row].text.ids_T)
        if words:
            read = weights_LL[-words]
        elif leading:
            read = weights_LL[0]
        else:
            read = weights_LL.mean(0)
        expected = read[leading : leading + height * width].view(height, width)
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)
        assert 0 < float(found[row].sum()) < 1 + 1e-6
        torch.testing.assert_close(attention_to_images(model, alone[row])[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_written_answer_looks_from_where_it_begins(kind: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caption's first tokens are a question, which is not learned; the words of the answer change nothing."""
    model = tiny_model(positions=positions, **MODELS[kind]).eval()
    together, alone = batches(model)
    for batch in (together, *alone):
        for start, end in pairwise(batch.caption.cu_seqlens_S1.tolist()):
            batch.caption.labels_T[start : start + min(2, end - start - 2)] = IGNORE
    found = attention_to_images(model, together, written=True)
    leading = 1 if "image" in model.modalities else model.config.image_tower.leading_tokens
    captioned = set(together.caption.rows_S.tolist())
    grids = dict(enumerate(GRIDS["image"])) if "image" in model.modalities else dict.fromkeys(together.image_rows_N.tolist(), (1, 2, 2))
    assert sorted(found) == sorted(row for row, grid in grids.items() if grid and row in captioned) != []
    for row, map_HW in found.items():
        weights_LL = weights_of(model, alone[row], monkeypatch, written=True)
        words = len(alone[row].caption.ids_T)
        first = (alone[row].caption.labels_T != IGNORE).nonzero()[0].item()
        _, height, width = grids[row]  # type: ignore[misc]
        expected = weights_LL[int(first) - words][leading : leading + height * width].view(height, width)
        torch.testing.assert_close(map_HW, expected, rtol=1e-5, atol=1e-6)
        alone[row].caption.ids_T[int(first) + 1 :] = 30
        torch.testing.assert_close(attention_to_images(model, alone[row], written=True)[0], expected, rtol=1e-5, atol=1e-6)


def test_without_fusion_layers_or_images_there_is_nothing_to_see() -> None:
    assert attention_to_images(tiny_model(fusion_layers=0).eval(), make_batch(SHOWN, mask_images=False)) == {}
    assert attention_to_images(tiny_model().eval(), make_batch([Row(False), Row(False, text=None)])) == {}
