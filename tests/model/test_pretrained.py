"""Experts started from tiny BERT- and ViT-shaped checkpoints, saved here with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, RobertaConfig, RobertaModel, ViTConfig, ViTImageProcessor, ViTModel

from mmscale.data.batch import Batch
from mmscale.model import MMScaleModel
from mmscale.model.embeddings import resize_positions
from mmscale.model.pretrained import load_image, load_text
from mmscale.model_config import ModelConfig
from shards.errors import ConfigError
from tests.model.tiny import VOCAB, make_batch, random_rows, tiny_model

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}


def save(model: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def vit(folder: Path, layers: int = 2, **changes: Any) -> Path:
    torch.manual_seed(1)
    return save(ViTModel(ViTConfig(num_hidden_layers=layers, **{**SHAPE, "image_size": 16, "patch_size": 8, **changes})), folder)


def bert(folder: Path, layers: int = 2, **changes: Any) -> Path:
    torch.manual_seed(1)
    return save(BertModel(BertConfig(num_hidden_layers=layers, **{**SHAPE, "vocab_size": VOCAB, **changes})), folder)


def perceived(model: MMScaleModel, batch: Batch) -> torch.Tensor:
    """Lower states of the images, (N, L, D)."""
    return model.lower_perception(batch, model.lay_out(batch))[0].view(len(batch.image_rows_N), -1, model.config.hidden_size)


def test_a_tower_started_from_a_vit_computes_what_the_vit_computes(tmp_path: Path) -> None:
    model = tiny_model(qk_norm=False, layer_norm_eps=1e-12).eval()
    report = load_image(model, vit(tmp_path))
    batch = make_batch(random_rows(3))
    ours = model.image_projection(perceived(model, batch))[0]
    with torch.no_grad():
        theirs = ViTModel.from_pretrained(tmp_path).eval()(batch.pixels_NCHW.float() / 127.5 - 1).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert report.left == ["pooler.dense.weight", "pooler.dense.bias"]
    assert all(name == "image_embedding.mask_token" or ".perception." in name for name in report.missing)


def test_pixels_are_scaled_as_the_checkpoint_saw_them(tmp_path: Path) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    vit(tmp_path)
    ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    message = r"was trained with image_mean = \[0\.485, 0\.456, 0\.406\], the model has \[0\.5, 0\.5, 0\.5\]\. Set model\.image_mean to the"
    with pytest.raises(ConfigError, match=message):
        load_image(tiny_model(qk_norm=False), tmp_path)
    model = tiny_model(qk_norm=False, layer_norm_eps=1e-12, image_mean=mean, image_std=std).eval()
    load_image(model, tmp_path)
    batch = make_batch(random_rows(3))
    ours = model.image_projection(perceived(model, batch))[0]
    pixels = (batch.pixels_NCHW.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        theirs = ViTModel.from_pretrained(tmp_path).eval()(pixels).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_deeper_vit_goes_on_in_the_fusion_layers_and_the_rest_is_left(tmp_path: Path) -> None:
    model = tiny_model(unimodal_layers=1, fusion_layers=1)
    report = load_image(model, vit(tmp_path, layers=3))
    source = ViTModel.from_pretrained(tmp_path).state_dict()
    down = next(source[name] for name in ("layers.1.mlp.fc2.weight", "encoder.layer.1.output.dense.weight") if name in source)
    torch.testing.assert_close(model.fusion_layers[0].perception.down.weight, down)
    assert any("layer" in name and ".2." in name for name in report.left)
    assert {"image_projection.norm.weight", "image_layers.0.expert.q_norm.weight"} <= set(report.missing)


def test_a_vit_of_another_resolution_has_its_positions_interpolated(tmp_path: Path) -> None:
    model = tiny_model(image_size=32)
    load_image(model, vit(tmp_path))
    source = ViTModel.from_pretrained(tmp_path).state_dict()["embeddings.position_embeddings"][0]
    assert model.image_embedding.positions.shape == (17, 32)
    torch.testing.assert_close(model.image_embedding.positions[0], source[0])
    flat = torch.cat([source[:1], source[1:2].expand(4, -1)])
    torch.testing.assert_close(resize_positions(flat, 16)[1:], source[1:2].expand(16, -1), rtol=1e-4, atol=1e-5)


def test_bert_weights_go_to_the_places_that_feed_the_same_sublayers(tmp_path: Path) -> None:
    model = tiny_model()
    report = load_text(model, bert(tmp_path))
    source = BertModel.from_pretrained(tmp_path).state_dict()
    first, second = (layer.expert for layer in model.text_layers)
    query = source["encoder.layer.0.attention.self.query.weight"]
    torch.testing.assert_close(first.qkv.weight[:32], query)
    torch.testing.assert_close(first.mlp_norm.weight, source["encoder.layer.0.attention.output.LayerNorm.weight"])
    torch.testing.assert_close(second.attention_norm.bias, source["encoder.layer.0.output.LayerNorm.bias"])
    torch.testing.assert_close(model.caption_projection.norm.weight, source["encoder.layer.1.output.LayerNorm.weight"])
    positions = source["embeddings.position_embeddings.weight"][:24] + source["embeddings.token_type_embeddings.weight"][0]
    torch.testing.assert_close(model.text_embedding.positions.weight, positions)
    ids = torch.arange(5, 12)
    with torch.no_grad():
        embedded = model.eval().text_embedding(ids, torch.arange(7))
        expected = BertModel.from_pretrained(tmp_path).eval().embeddings(input_ids=ids[None])[0]
    torch.testing.assert_close(embedded, expected, rtol=1e-3, atol=1e-3)  # up to the norms' epsilon
    assert report.left == ["pooler.dense.weight", "pooler.dense.bias"]
    assert "  left        2  pooler.dense.weight, pooler.dense.bias" in str(report)
    assert str(report).startswith(f"started from {tmp_path}\n  loaded")


def test_roberta_positions_start_behind_the_padding_row(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save(
        RobertaModel(RobertaConfig(num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=20, type_vocab_size=1, **SHAPE)), tmp_path
    )
    model = tiny_model()
    before = model.text_embedding.positions.weight.detach().clone()
    load_text(model, tmp_path)
    source = RobertaModel.from_pretrained(tmp_path).state_dict()
    expected = source["embeddings.position_embeddings.weight"][2:] + source["embeddings.token_type_embeddings.weight"][0]
    torch.testing.assert_close(model.text_embedding.positions.weight[:18], expected)
    torch.testing.assert_close(model.text_embedding.positions.weight[18:], before[18:])


def test_the_configuration_names_the_checkpoints(tmp_path: Path) -> None:
    model = tiny_model()
    bert(tmp_path / "text")
    vit(tmp_path / "image")
    config = ModelConfig(init_text_from=str(tmp_path / "text"), init_image_from=str(tmp_path / "image"))
    assert [Path(r.source).name for r in model.load_pretrained_towers(config)] == ["text", "image"]
    assert model.load_pretrained_towers(ModelConfig()) == []


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"`model.init_text_from` must be a local transformers folder"):
        load_text(model, tmp_path)
    GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r"must be a checkpoint of type bert or .*holds a gpt2"):
        load_text(model, tmp_path / "gpt")
    with pytest.raises(ConfigError, match=r"has hidden_size = 64, the model 32"):
        load_text(model, bert(tmp_path / "wide", hidden_size=64))
    with pytest.raises(ConfigError, match=r"has a vocabulary of 50, data.tokenizer one of 40"):
        load_text(model, bert(tmp_path / "words", vocab_size=50))
    with pytest.raises(ConfigError, match=r"has patches of 4 pixels, model.patch_size is 8"):
        load_image(model, vit(tmp_path / "patches", patch_size=4))
