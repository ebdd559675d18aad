from itertools import pairwise

import pytest
import torch
from torch import nn

from mmscale.config import OptimizerConfig
from mmscale.optim import freeze, learning_rate, parameter_groups
from shards.errors import ConfigError


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
