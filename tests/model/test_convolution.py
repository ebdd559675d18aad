"""The convolution over neighbouring patches: against a sum cell by cell, kept patches, ragged grids, and that it starts as nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmscale.model.convolution import Neighbours, PatchConvolution
from mmscale.model.text_convolution import TextConvolution, text_neighbours
from tests.model.checkpoints import started, vit
from tests.model.streams import NATIVE, stream_batch
from tests.model.tiny import all_objectives, make_batch, random_rows, tiny_model

WIDTH = 6


def cell_by_cell(x_XD: Tensor, coordinates_X3: Tensor, lengths_S: Tensor, weight: Tensor) -> Tensor:
    """The same sums by dictionaries of coordinates."""
    out, start = x_XD.clone(), 0
    for length in lengths_S.tolist():
        rows = range(start, start + length)
        cells = {tuple(coordinates_X3[row].tolist()): row for row in rows if coordinates_X3[row].min() > 0}
        for (t, h, w), row in cells.items():
            for dt, dh, dw in itertools.product((-1, 0, 1), repeat=3):
                beside = cells.get((t + dt, h + dh, w + dw))
                if beside is not None:
                    out[row] += weight[:, 0, dt + 1, dh + 1, dw + 1] * x_XD[beside]
        start += length
    return out


def check(neighbours: Neighbours, coordinates_X3: Tensor, lengths_S: Tensor) -> None:
    torch.manual_seed(0)
    module = PatchConvolution(WIDTH).double()
    torch.nn.init.normal_(module.weight)
    x_XD = torch.randn(len(coordinates_X3), WIDTH, dtype=torch.float64, requires_grad=True)
    found, expected = module(x_XD, neighbours), cell_by_cell(x_XD, coordinates_X3, lengths_S, module.weight)
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    for got, want in zip(*(torch.autograd.grad((y * probe).sum(), [x_XD, module.weight]) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_square_images(leading: int, kept: bool) -> None:
    image = {"leading_tokens": leading, "pooling": "cls" if leading else "attention", "convolution": True}
    model = tiny_model(image_size=32, image=image)
    batch = make_batch(random_rows(3), image_size=32)
    if kept:
        batch.kept_NK = torch.tensor([[0, 1, 4, 6, 15], [2, 3, 6, 9, 10], [0, 5, 10, 14, 15]])
        batch.patch_mask_NP = batch.patch_mask_NP[:, :5]
    percepts = model.lay_out(batch, masked=True)
    (neighbours,), items = percepts.neighbours, percepts.items[0]
    check(neighbours, items.coordinates_X3, items.lengths_S)


def test_items_of_any_shape() -> None:
    model = tiny_model(modalities=NATIVE, image={"convolution": True})
    percepts = model.lay_out(stream_batch(model), masked=True)
    assert len(percepts.parts) == 2
    for expert, neighbours in enumerate(percepts.neighbours):
        items = [i for i in percepts.items if i.expert == expert]
        check(neighbours, torch.cat([i.coordinates_X3 for i in items]), torch.cat([i.lengths_S for i in items]))


def test_square_images_are_convolved_as_torch_does() -> None:
    torch.manual_seed(0)
    model = tiny_model(image_size=32, image={"convolution": True, "leading_tokens": 1})
    batch = make_batch(random_rows(3), image_size=32)
    percepts = model.lay_out(batch)
    (near,) = percepts.neighbours
    x_XD = torch.randn(3 * 17, 32)
    convolution = model.fusion_layers[0].perception.convolution
    found_NGGD = convolution(x_XD, near).view(3, 17, 32)[:, 1:]
    grid_NDGG = x_XD.view(3, 17, 32)[:, 1:].transpose(1, 2).reshape(3, 32, 4, 4)
    expected = grid_NDGG + torch.nn.functional.conv2d(grid_NDGG, convolution.weight[:, :, 1], padding=1, groups=32)
    torch.testing.assert_close(found_NGGD.transpose(1, 2).reshape(3, 32, 4, 4), expected, rtol=1e-4, atol=1e-5)


def test_every_tap_learns() -> None:
    model = tiny_model(image={"convolution": True}, text={"convolution": True})
    sum(term.sum for term in model(make_batch(random_rows(4, longest=12)), all_objectives()).values()).backward()
    for block in (model.image_layers[0].expert, model.fusion_layers[0].perception):
        slope = block.convolution.weight.grad
        assert slope[:, :, 1].abs().min() > 0  # 2 x 2 patches: each has all others beside it, none in time
        assert not slope[:, :, ::2].any()
    assert model.text_layers[1].expert.convolution.weight.grad.abs().min() > 0


def along_the_text(x_UD: Tensor, lengths: list[int], causal: int, weight_DK: Tensor) -> Tensor:
    out, start = x_UD.clone(), 0
    for number, length in enumerate(lengths):
        for here, there in itertools.product(range(length), repeat=2):
            if abs(there - here) <= 2 and (number >= causal or there <= here):
                out[start + here] += weight_DK[:, there - here + 2] * x_UD[start + there]
        start += length
    return out


@pytest.mark.parametrize("causal", [0, 2, 5])
def test_words_see_those_beside_them_and_causal_ones_those_before(causal: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 7, 3, 2, 9]
    module = TextConvolution(WIDTH).double()
    torch.nn.init.normal_(module.weight)
    x_UD = torch.randn(sum(lengths), WIDTH, dtype=torch.float64, requires_grad=True)
    offsets_U = torch.cat([torch.arange(length) for length in lengths])
    found = module(x_UD, text_neighbours(offsets_U, torch.tensor(lengths), sum(lengths[:causal])))
    expected = along_the_text(x_UD, lengths, causal, module.weight[:, 0])
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(found)
    for got, want in zip(*(torch.autograd.grad((y * probe).sum(), [x_UD, module.weight]) for y in (found, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_one_word_after_the_other_is_the_same() -> None:
    torch.manual_seed(0)
    module = TextConvolution(WIDTH)
    torch.nn.init.normal_(module.weight)
    x_BTD = torch.randn(3, 6, WIDTH)
    offsets_U = torch.arange(6).repeat(3)
    whole = module(x_BTD.flatten(0, 1), text_neighbours(offsets_U, torch.tensor([6, 6, 6]), 18)).view(3, 6, WIDTH)
    one_by_one = torch.stack([module.next(x_BTD[:, t], x_BTD[:, :t]) for t in range(6)], dim=1)
    torch.testing.assert_close(one_by_one, whole)


@torch.no_grad()
def test_a_tower_of_a_checkpoint_computes_what_it_computed(tmp_path: Path) -> None:
    folder = vit(tmp_path)
    plain, _ = started(image=folder)
    convolved, _ = started(image=folder, **{"image.convolution": True})
    assert not any(layer.expert.convolution.weight.any() for layer in convolved.image_layers)
    convolved.image_projection.load_state_dict(plain.image_projection.state_dict())
    rows = random_rows(3)
    torch.testing.assert_close(convolved.embed_images(make_batch(rows)), plain.embed_images(make_batch(rows)))
