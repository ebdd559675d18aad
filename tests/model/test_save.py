"""Saved and loaded models are equal bit for bit, and transformers finds them by type."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from mmscale.model import MMScaleConfig, MMScaleModel, register
from mmscale.model_config import ModelConfig, TextTowerConfig
from shards.errors import ConfigError
from tests.model.tiny import all_objectives, make_batch, random_rows, tiny_config, tiny_model


def test_save_and_load_are_bit_equal_in_weights_configuration_and_losses(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = MMScaleModel.from_pretrained(tmp_path).train()
    mine, theirs = model.config.to_dict(), again.config.to_dict()
    for key in ("dtype", "_name_or_path"):
        mine.pop(key), theirs.pop(key)
    assert mine == theirs
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    batch = make_batch(random_rows(4))
    mine, theirs = (m(batch, all_objectives()) for m in (model, again))
    assert {k: t.sum.item() for k, t in mine.items()} == {k: t.sum.item() for k, t in theirs.items()}


def test_transformers_finds_the_model_by_its_type(tmp_path: Path) -> None:
    register()
    tiny_model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MMScaleConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MMScaleModel)


def test_a_head_that_a_checkpoint_lacks_starts_anew(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = tiny_config()
    config.heads = {"label": 3, "other": 5}
    again = MMScaleModel.from_pretrained(tmp_path, config=config)
    assert torch.equal(again.task_heads["label"].linear.weight, model.task_heads["label"].linear.weight)
    weight = again.task_heads["other"].linear.weight
    assert weight.shape == (5, 32)
    assert 0.01 < weight.std() < 0.03


def test_initialisation_is_truncated_normal_and_smaller_into_the_residual_stream() -> None:
    torch.manual_seed(0)
    model = MMScaleModel(tiny_config(hidden_size=64))
    expert = model.fusion_layers[0].text
    assert abs(expert.qkv.weight.std().item() * 64**0.5 - 0.88) < 0.05
    assert abs(expert.out.weight.std().item() * (8 * 64) ** 0.5 - 0.88) < 0.05
    assert abs(expert.down.weight.std().item() * (8 * expert.down.in_features) ** 0.5 - 0.88) < 0.05
    assert model.matching_head.linear.weight.abs().max() <= 0.04
    assert model.language_head.weight.abs().max() <= 0.04
    assert abs(model.text_embedding.words.weight.std().item() / 0.02 - 0.88) < 0.05
    scale, bias = model.contrastive_scale()
    assert scale.item() == pytest.approx(10.0)
    assert bias.item() == pytest.approx(-math.log(32768))  # SigLIP's -10, at its batch size
    config = tiny_config()
    config.contrastive_candidates = 256
    assert MMScaleModel(config).contrastive_scale()[1].item() == pytest.approx(-math.log(256))
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = tiny_model(seed=3), tiny_model(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_tables_of_text_start_as_large_as_they_are_told() -> None:
    torch.manual_seed(0)
    embedding = MMScaleModel(tiny_config(hidden_size=64, text={"table_std": 1.0})).text_embedding
    for table in (embedding.words, embedding.positions):
        assert abs(table.weight.std().item() - 0.88) < 0.05
    with pytest.raises(ConfigError, match=r"`model.text.table_std` must be above 0; got 0.0"):
        ModelConfig(text=TextTowerConfig(table_std=0.0)).check()
