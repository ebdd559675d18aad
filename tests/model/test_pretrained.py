"""Towers started from tiny checkpoints of every family compute what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

from mmscale.data.batch import Batch, TextStream
from mmscale.model import MMScaleModel
from mmscale.model.pretrained import load_towers, model_section
from mmscale.model.sequences import Entry, arrange, gather_parts
from mmscale.model_config import ModelConfig
from shards.errors import ConfigError
from tests.model.checkpoints import IMAGE, PIXELS, SHAPE, TEXT, bert, clip, deit, original, save, section, siglip, siglip2, started, vit
from tests.model.tiny import VOCAB, Row, all_objectives, make_batch, random_rows, tiny_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BATCH = make_batch(random_rows(5), mask_images=False)
BATCH.caption.ids_T[BATCH.caption.ids_T == VOCAB - 1] = 4
BATCH.caption.ids_T[BATCH.caption.cu_seqlens_S1[1:].long() - 1] = VOCAB - 1  # the end token of the CLIP checkpoints


def sequences(stream: TextStream) -> list[Tensor]:
    """The ids of each sequence."""
    return list(stream.ids_T.split(stream.cu_seqlens_S1.diff().tolist()))


def perceived(model: MMScaleModel, batch: Batch = BATCH) -> Tensor:
    """Lower states of the images, (N, L, D)."""
    return model.lower_perception(batch, model.lay_out(batch))[0].view(len(batch.image_rows_N), -1, model.config.hidden_size)


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
        image_NLD = perceived(model)
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
    percepts = model.lay_out(BATCH)
    seqs = arrange([entry], offsets, percepts, model.config, torch.float32)
    parts = (*gather_parts(model.lower_perception(BATCH, percepts), percepts, seqs.gathers), text_UD[seqs.tokens_T])
    for block in model.fusion_layers:
        parts = block(parts, seqs.plan, None)
    return parts


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
    batch = make_batch([Row(), Row()], image_size=32)
    batch.pixels_NCHW = pixels
    ours = model.image_projection.norm(perceived(model, batch))
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


def test_what_a_model_lacks_is_said_in_one_paragraph(tmp_path: Path) -> None:
    folders = clip(tmp_path / "clip"), vit(tmp_path / "vit")
    names = ModelConfig(init_text_from=str(folders[0]), init_image_from=str(folders[1]))
    with pytest.raises(ConfigError) as error:
        load_towers(tiny_model(), names)
    message = str(error.value)
    keys = ["qk_norm=false (now true)", "mlp_ratio=3 (now 4)", "layer_norm_eps=1e-12 (now 1e-06)", "text.hidden_size=16 (now 32)"]
    keys += ["text.num_heads=1 (now 2)", "text.activation=quick_gelu (now gelu)", "text.embedding_norm=false (now true)"]
    assert all(f"model.{key}" in message for key in keys), message
    assert "text.norm" not in message
    assert "\n" not in message
    load_towers(tiny_model(**section(*folders)), names)  # and with all of them it is started


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (bert, {"text": {"norm": "pre"}}, r"Set model\.text\.norm=post \(now pre\)"),
        (deit, {"image": {"leading_tokens": 1}}, r"Set model\.image\.leading_tokens=2 \(now 1\)\. `mmscale"),
        (clip, {"activation": "gelu"}, r"Set model\.activation=quick_gelu \(now gelu\)"),
        (vit, {"patch_size": 4}, r"Set model\.patch_size=8 \(now 4\)"),
        (vit, {"image": {"activation": "quick_gelu"}}, r"Set model\.image\.activation=gelu \(now quick_gelu\)"),
    ],
)
def test_each_key_is_compared(tmp_path: Path, make: Any, changes: dict[str, Any], message: str) -> None:
    folder = str(make(tmp_path))
    names = ModelConfig(**({"init_text_from": folder} if make in (bert, clip) else {"init_image_from": folder}))
    keys = section(tmp_path)
    merged = {k: {**keys[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        load_towers(tiny_model(**{**keys, **merged}), names)


def test_pixels_are_scaled_as_the_checkpoint_saw_them(tmp_path: Path) -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(vit(tmp_path))
    assert tuple(section(tmp_path)["image_mean"]) == mean
    with pytest.raises(ConfigError, match=r"Set model\.image_mean=\[0\.48145466,0\.4578275,0\.40821073\] \(now \[0\.5,0\.5,0\.5\]\)"):
        started(image=tmp_path, image_mean=(0.5, 0.5, 0.5))
    model, _ = started(image=tmp_path)
    pixels = (BATCH.pixels_NCHW.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        ours = model.image_projection.norm(perceived(model))
        torch.testing.assert_close(ours, original(tmp_path)(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model.init_text_from` must be a local transformers folder"):
        load_towers(tiny_model(), ModelConfig(init_text_from=str(tmp_path)))
    GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r"`model.init_text_from` must be a checkpoint of type bert or .*holds a gpt2"):
        load_towers(tiny_model(), ModelConfig(init_text_from=str(tmp_path / "gpt")))
    with pytest.raises(ConfigError, match=r"holds a gpt2; known are bert, .*siglip2_vision_model"):
        model_section([str(tmp_path / "gpt")])
    with pytest.raises(ConfigError, match=r"has a vocabulary of 50, data.tokenizer one of 40"):
        started(text=bert(tmp_path / "words", vocab_size=50))
    with pytest.raises(ConfigError, match=r"has no tower that another of the checkpoints does not have"):
        model_section([str(tmp_path / "words"), str(tmp_path / "words")])
    with pytest.raises(ConfigError, match=r"activation 'relu' is none of the model's"):
        model_section([str(bert(tmp_path / "relu", hidden_act="relu"))])


def test_a_checkpoint_without_a_tensor_says_that_it_starts_at_random(tmp_path: Path) -> None:
    save(ViTForImageClassification(ViTConfig(**SHAPE, **PIXELS)), tmp_path)
    _, (report,) = started(image=tmp_path)
    assert report.left == []  # no pooler: what transformers would draw at random is not taken for the checkpoint's
    assert str(report).startswith(f"started from {tmp_path}\n  loaded")


@torch.no_grad()
def test_images_without_a_cls_token_are_classified_by_the_mean_of_their_patches(tmp_path: Path) -> None:
    model, _ = started(image=siglip(tmp_path))
    batch = make_batch([Row(text=None, caption=None, label=i) for i in range(3)], mask_images=False)
    logits = model.classify(batch)
    alone = [model.classify(make_batch([Row(text=None, caption=None, label=i)], first=i, mask_images=False)) for i in range(3)]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    n = torch.arange(3)
    image_TD = perceived(model, batch).flatten(0, 1)
    none = torch.zeros(1, dtype=torch.int64)
    seqs = arrange([Entry(n, torch.full((3,), -1))], none, model.lay_out(batch), model.config, torch.float32)
    for block in model.fusion_layers:
        image_TD, _ = block((image_TD, image_TD[:0]), seqs.plan, None)
    torch.testing.assert_close(logits, model.task_heads["label"](image_TD.view(3, 4, -1).mean(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("families", [("siglip", "siglip"), ("clip", "deit"), ("bert", "vit")])
def test_every_objective_trains_towers_of_every_kind(tmp_path: Path, families: tuple[str, str]) -> None:
    text, image = TEXT[families[0]](tmp_path / families[0]), IMAGE[families[1]](tmp_path / families[1])
    model, _ = started(text, image, **{"text.captions": "causal"})
    model.train()
    objectives = all_objectives()
    for rows in (random_rows(4), [Row(image=False)] * 2, [Row(caption=None, text=None)] * 2):
        model.zero_grad()
        sum(term.sum for term in model(make_batch(rows), objectives).values()).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert without == []
