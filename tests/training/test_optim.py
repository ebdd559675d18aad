from itertools import pairwise

import pytest
import torch
from torch import nn

from mmscale.config import OptimizerConfig
from mmscale.optim import distances, freeze, learning_rate, parameter_groups
from shards.errors import ConfigError
from tests.model.tiny import tiny_model

POSITIONS = "text_embedding.positions.weight"


def model() -> nn.Module:
    return nn.ModuleDict({"words": nn.Embedding(5, 4), "up": nn.Linear(4, 8), "norm": nn.LayerNorm(8)})


def test_only_matrices_decay() -> None:
    decayed, plain = parameter_groups(model(), OptimizerConfig(weight_decay=0.3))
    assert [tuple(p.shape) for p in decayed["params"]] == [(8, 4)]
    assert [tuple(p.shape) for p in plain["params"]] == [(5, 4), (8,), (8,), (8,)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)


def test_frozen_parameters_leave_the_groups() -> None:
    net = model()
    assert freeze(net, [r"^words\.", "norm"]) == ["words.weight", "norm.weight", "norm.bias"]
    assert sum(len(g["params"]) for g in parameter_groups(net, OptimizerConfig())) == 2


def test_freeze_refuses_what_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"`optimizer.freeze`: 'tower' matches no parameter\. Names look like words.weight"):
        freeze(model(), ["tower"])
    with pytest.raises(ConfigError, match=r"`optimizer.freeze`: '\(' is not a regular expression"):
        freeze(model(), ["("])


def test_learning_rate_warms_up_then_follows_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[12] == pytest.approx(2.0 * 0.55)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert learning_rate(20, 20, config) == pytest.approx(0.2)


def test_every_trained_parameter_is_in_one_group() -> None:
    net = model()
    ids = [id(p) for g in parameter_groups(net, OptimizerConfig()) for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())
    assert isinstance(net["words"], nn.Embedding)
    assert torch.is_tensor(net["words"].weight)


def test_layers_are_counted_from_the_heads_down_for_each_tower() -> None:
    names = ["image_embedding.cls_token", "image_layers.0.up", "image_layers.2.up", "text_embedding.words", "model.text_layers.0.up"]
    names += ["fusion_layers.0.text.up", "model.fusion_layers.1.text.up", "image_projection.linear", "task_heads.label.linear"]
    assert list(distances(names).values()) == [6, 5, 3, 4, 3, 2, 1, 0, 0]


def test_experts_of_modalities_are_as_deep_as_that_of_images() -> None:
    net = tiny_model(modalities={"audio": {"mels": 16, "patch": 8, "max_seconds": 0.4, "expert": "ears"}})
    below = distances([name for name, _ in net.named_parameters()])
    assert below["expert_layers.ears.0.expert.up.bias"] == below["image_layers.0.expert.up.bias"] == 4
    assert below["fusion_layers.1.experts.ears.up.bias"] == 1
    assert below["patch_embeddings.audio.patch_bias"] == below["image_embedding.patch_bias"] == 5
    assert below["patch_heads.audio.linear.bias"] == 0


def test_the_rate_of_a_group_falls_with_the_depth_of_its_layer() -> None:
    net = tiny_model(unimodal_layers=1, fusion_layers=1)
    groups = parameter_groups(net, OptimizerConfig(layer_decay=0.5, head_lr_ratio=3.0))
    names = {id(p): name for name, p in net.named_parameters()}
    factors = {names[id(p)]: g.get("lr_factor", 1.0) for g in groups for p in g["params"]}
    assert len(factors) == len(names)
    assert factors["matching_head.linear.weight"] == factors["image_projection.norm.bias"] == 3.0
    assert factors["fusion_layers.0.text.qkv.weight"] == 0.5
    assert factors["text_layers.0.expert.qkv.bias"] == 0.25
    assert factors["image_embedding.patch_weight"] == 0.125
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {n for n, p in net.named_parameters() if p.ndim > 1 and n not in ("text_embedding.words.weight", POSITIONS)}


def test_without_factors_there_are_the_two_plain_groups() -> None:
    groups = parameter_groups(tiny_model(), OptimizerConfig())
    assert [sorted(g) for g in groups] == [["params", "weight_decay"]] * 2
