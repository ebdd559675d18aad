"""Towers started from tiny checkpoints of every family compute what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.data.batch import TextStream
from mmscale.model import MMScaleModel
from mmscale.model.sequences import Entry, arrange
from tests.model.checkpoints import IMAGE, TEXT, bert, clip, original, siglip, siglip2, started, vit
from tests.model.tiny import VOCAB, Row, make_batch, random_rows

NONE = torch.zeros(0, dtype=torch.int64)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH = make_batch(random_rows(5), mask_images=False)
BATCH.caption.ids_T[BATCH.caption.ids_T == VOCAB - 1] = 4
BATCH.caption.ids_T[BATCH.caption.cu_seqlens_S1[1:].long() - 1] = VOCAB - 1  # the end token of the CLIP checkpoints


def sequences(stream: TextStream) -> list[Tensor]:
    """The ids of each sequence."""
    return list(stream.ids_T.split(stream.cu_seqlens_S1.diff().tolist()))


def tower_of(model: Any, modality: str) -> Any:
    """The tower of a checkpoint that may have two."""
    return getattr(model, "text_model" if modality == "text" else "vision_model", model)


@pytest.mark.parametrize("family", TEXT)
def test_a_text_tower_computes_what_the_checkpoint_computes(tmp_path: Path, family: str) -> None:
    model, (report,) = started(text=TEXT[family](tmp_path))
    tower = tower_of(original(tmp_path), "text")
    with torch.no_grad():
        text_UD, _ = model.lower_text(BATCH.caption, BATCH.text)
        ours = model.caption_projection(text_UD)[0]
        caption = torch.cat([tower(input_ids=ids[None]).last_hidden_state[0] for ids in sequences(BATCH.caption)])
        text = torch.cat([tower(input_ids=ids[None]).last_hidden_state[0] for ids in sequences(BATCH.text)])
    torch.testing.assert_close(ours[: len(caption)], caption, **CLOSE)
    if family != "clip":  # which never sees ahead
        torch.testing.assert_close(ours[len(caption) :], text, **CLOSE)
    assert set(report.left) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert [n for n in report.missing if not n.startswith("fusion_layers.")] == (
        ["caption_projection.linear.weight"] if "bert" in family else []
    )


@pytest.mark.parametrize("family", IMAGE)
def test_an_image_tower_computes_what_the_checkpoint_computes(tmp_path: Path, family: str) -> None:
    model, (report,) = started(image=IMAGE[family](tmp_path))
    tower = tower_of(original(tmp_path), "image")
    with torch.no_grad():
        image_NLD = model.lower_images(BATCH.pixels_NCHW, BATCH.patch_mask_NP, NONE)
        theirs = tower(**pixels_for(family, BATCH.pixels_NCHW)).last_hidden_state
    ours = image_NLD if family == "clip" else model.image_projection.norm(image_NLD)  # CLIP norms its [CLS] alone
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert set(report.left) <= {"pooler.dense.weight", "pooler.dense.bias"}
    missing = [n for n in report.missing if not n.startswith("fusion_layers.")]
    assert missing == ["image_embedding.mask_token"] + (["image_projection.linear.weight"] if "it" in family else [])


def pixels_for(family: str, pixels_NCHW: Tensor) -> dict[str, Tensor]:
    """The input of a checkpoint whose preprocessor, which is not there, scales to [-1, 1]."""
    values = pixels_NCHW.float() / 127.5 - 1
    if family != "siglip2":
        return {"pixel_values": values}
    n, c, h, w = values.shape
    patches = values.view(n, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # as its image processor cuts
    shapes = torch.tensor([[h // 8, w // 8]] * n)
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2]), "spatial_shapes": shapes}


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_embeddings_are_those_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    folder = TEXT[family](tmp_path)
    model, reports = started(folder, folder)
    theirs = original(folder)
    with torch.no_grad():
        images, captions = model.embed_images(BATCH), model.embed_captions(BATCH)
        wanted = theirs.get_image_features(**pixels_for(family, BATCH.pixels_NCHW)).pooler_output
        torch.testing.assert_close(images, torch.nn.functional.normalize(wanted), **CLOSE)
        rows = [theirs.get_text_features(input_ids=ids[None]).pooler_output[0] for ids in sequences(BATCH.caption)]
        torch.testing.assert_close(captions, torch.nn.functional.normalize(torch.stack(rows)), **CLOSE)
        scale, bias = model.contrastive_scale()
    assert not [n for r in reports for n in r.left]
    if family != "clip":
        torch.testing.assert_close(scale, theirs.logit_scale.exp().clamp(max=100))
        torch.testing.assert_close(bias, theirs.logit_bias)
        assert "contrastive_scale.bias" in reports[1].loaded


def test_a_padded_siglip_caption_is_a_caption_of_padding_tokens(tmp_path: Path) -> None:
    folder = siglip(tmp_path)
    model, (report,) = started(text=folder)
    batch = make_batch([Row(caption=(7, 8, 2, *[0] * 8)), Row(caption=(9, 2, *[0] * 9))])
    ids = torch.stack(sequences(batch.caption))
    with torch.no_grad():
        wanted = original(folder).get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(model.embed_captions(batch), torch.nn.functional.normalize(wanted), **CLOSE)
    assert any("padded to 24 tokens" in note for note in report.notes)


def upper(model: MMScaleModel, entry: Entry) -> tuple[Tensor, Tensor]:
    """The whole stack over sequences of one kind; all its rows."""
    text_UD, offsets = model.lower_text(BATCH.caption, BATCH.text)
    image_NLD = model.lower_images(BATCH.pixels_NCHW, BATCH.patch_mask_NP, NONE)
    seqs = arrange([entry], offsets, model.config.image_tokens, torch.float32)
    image_TD, text_TD = image_NLD[seqs.images].flatten(0, 1), text_UD[seqs.tokens_T]
    for block in model.fusion_layers:
        image_TD, text_TD = block(image_TD, text_TD, seqs.plan, None)
    return image_TD, text_TD


@torch.no_grad()
def test_a_deeper_checkpoint_goes_on_in_the_fusion_layers(tmp_path: Path) -> None:
    folders = bert(tmp_path / "text", num_hidden_layers=3), vit(tmp_path / "image", num_hidden_layers=3)
    model, reports = started(*folders, unimodal_layers=1, fusion_layers=2)
    captions, texts, images = len(BATCH.caption.rows_S), len(BATCH.text.rows_S), len(BATCH.image_rows_N)
    _, text_TD = upper(model, Entry(torch.full((texts,), -1), torch.arange(texts) + captions))
    wanted = [original(folders[0])(input_ids=ids[None]).last_hidden_state[0] for ids in sequences(BATCH.text)]
    torch.testing.assert_close(text_TD, torch.cat(wanted), **CLOSE)
    image_TD, _ = upper(model, Entry(torch.arange(images), torch.full((images,), -1)))
    vision = original(folders[1])
    hidden = vision.layernorm(image_TD.view(images, -1, 32))
    torch.testing.assert_close(hidden, vision(**pixels_for("vit", BATCH.pixels_NCHW)).last_hidden_state, **CLOSE)
    assert all("lower layers" in " ".join(r.notes) for r in reports)
    assert not any(n.startswith("fusion_layers.") for r in reports for n in r.missing)
    assert "layernorm.weight" in reports[1].left


@torch.no_grad()
def test_a_shallower_checkpoint_leaves_random_layers_above(tmp_path: Path) -> None:
    model, (report,) = started(text=bert(tmp_path), unimodal_layers=3, fusion_layers=1)
    assert {"text_layers.2.expert.qkv.weight", "fusion_layers.0.text.qkv.weight"} <= set(report.missing)
    assert "the checkpoint has 2 layers, the 1 above them start at random" in report.notes
    assert torch.equal(model.text_layers[1].expert.up.bias, original(tmp_path).encoder.layer[1].intermediate.dense.bias)


@pytest.mark.parametrize(("make", "family"), [(vit, "vit"), (siglip, "siglip"), (siglip2, "siglip2")])
@torch.no_grad()
def test_positions_of_another_grid_are_interpolated_as_transformers_does(tmp_path: Path, make: Any, family: str) -> None:
    model, (report,) = started(image=make(tmp_path), image_size=32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ours = model.image_projection.norm(model.lower_images(pixels, torch.zeros(2, 16, dtype=torch.bool), NONE))
    more = {} if family == "siglip2" else {"interpolate_pos_encoding": True}
    theirs = tower_of(original(tmp_path), "image")(**pixels_for(family, pixels), **more).last_hidden_state
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert "positions of 2 x 2 patches were interpolated to 4 x 4" in report.notes


@torch.no_grad()
def test_towers_of_two_checkpoints_and_two_widths_meet_in_the_fusion_layers(tmp_path: Path) -> None:
    folders = clip(tmp_path / "clip"), vit(tmp_path / "vit")
    model, reports = started(*folders)
    assert model.text_bridge.weight.shape == (32, 16)
    text_UD, _ = model.lower_text(BATCH.caption, BATCH.text)
    theirs = original(folders[0]).text_model(input_ids=sequences(BATCH.caption)[0][None]).last_hidden_state[0]
    torch.testing.assert_close(model.caption_projection(text_UD)[0][: len(theirs)], theirs, **CLOSE)
    assert not any("vision" in name for name in reports[0].left + reports[0].loaded)
    assert all(torch.isfinite(v).all() for v in model.match_logits(BATCH))


@torch.no_grad()
def test_a_projection_of_another_size_is_left(tmp_path: Path) -> None:
    folder = clip(tmp_path)
    _, reports = started(folder, folder, projection_size=12)
    assert [r.left for r in reports] == [["text_projection.weight"], ["visual_projection.weight"]]
    assert all("its projection has 20 outputs, model.projection_size is 12: it was left" in r.notes for r in reports)
