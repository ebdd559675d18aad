"""The convolution over neighbouring patches: against a sum cell by cell, kept patches, ragged grids, and that it starts as nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mmscale.model.convolution import Canvas, PatchConvolution, canvas_of
from mmscale.model.percepts import Items, square_items, stream_items
from mmscale.model_config import ImageTowerConfig, ModelConfig
from shards.errors import ConfigError
from tests.model.streams import GRIDS, NATIVE, stream
from tests.model.tiny import all_objectives, make_batch, random_rows, tiny_config, tiny_model

WIDTH = 6


def cell_by_cell(x_XD: Tensor, items: Items, weight: Tensor) -> Tensor:
    """The same sums by dictionaries of coordinates."""
    out, start = x_XD.clone(), 0
    for length in items.lengths_S.tolist():
        rows = range(start, start + length)
        cells = {tuple(items.coordinates_X3[row].tolist()): row for row in rows if items.coordinates_X3[row].min() > 0}
        for (t, h, w), row in cells.items():
            for dt, dh, dw in itertools.product((-1, 0, 1), repeat=3):
                beside = cells.get((t + dt, h + dh, w + dw))
                if beside is not None:
                    out[row] += weight[:, 0, dt + 1, dh + 1, dw + 1] * x_XD[beside]
        start += length
    return out


def check(items: Items, canvas: Canvas) -> None:
    torch.manual_seed(0)
    module = PatchConvolution(WIDTH).double()
    torch.nn.init.normal_(module.weight)
    x_XD = torch.randn(len(items.coordinates_X3), WIDTH, dtype=torch.float64, requires_grad=True)
    found, expected = module(x_XD, [canvas]), cell_by_cell(x_XD, items, module.weight)
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    for got, want in zip(*(torch.autograd.grad((y * probe).sum(), [x_XD, module.weight]) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_square_images(leading: int, kept: bool) -> None:
    pooling = {"leading_tokens": leading, "pooling": "cls" if leading else "attention"}
    config = tiny_config(image_size=32, image={"convolution": True} | pooling)
    batch = make_batch(random_rows(3), image_size=32)
    if kept:
        batch.kept_NK = torch.tensor([[0, 1, 4, 6, 15], [2, 3, 6, 9, 10], [0, 5, 10, 14, 15]])
        batch.patch_mask_NP = batch.patch_mask_NP[:, :5]
    items = square_items(batch, config, masked=True)
    check(items, canvas_of(items, config.square_grid))


@pytest.mark.parametrize("name", list(NATIVE))
def test_items_of_any_shape(name: str) -> None:
    model = tiny_model(modalities=NATIVE)
    items = stream_items(name, stream(name, model.modalities[name], GRIDS[name]), 0, masked=True)
    check(items, canvas_of(items, None))


def test_it_starts_as_nothing_and_learns() -> None:
    plain, convolved = tiny_model(spread=0.0), tiny_model(spread=0.0, image={"convolution": True})
    missing, unexpected = convolved.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing == [f"image_layers.{layer}.convolution.weight" for layer in range(2)]
    batch, objectives = make_batch(random_rows(4)), all_objectives()
    expected, found = plain(batch, objectives), convolved(batch, objectives)
    for name, term in expected.items():
        torch.testing.assert_close(found[name].sum, term.sum)
    sum(term.sum for term in found.values()).backward()
    for layer in convolved.image_layers:
        assert layer.convolution.weight.grad[:, :, 1].abs().min() > 0  # 2 x 2 patches: each has all others beside it, none in time
        assert not layer.convolution.weight.grad[:, :, ::2].any()


def test_it_needs_a_layer_to_stand_before() -> None:
    config = ModelConfig(unimodal_layers=0, image=ImageTowerConfig(convolution=True))
    with pytest.raises(ConfigError, match=r"^`model\.image\.convolution` stands before the lower layers of images, and there are none"):
        config.check()
