"""What the launcher expects of a configuration, against the model that it describes."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.estimate import estimate
from mmscale.config import LoraConfig, RunConfig, TrainConfig, ZeroConfig
from mmscale.model import MMScaleModel, mmscale_config
from mmscale.model_config import ModelConfig
from mmscale.objectives_config import ObjectiveConfig, ObjectivesConfig

SHAPE = {"hidden_size": 64, "num_heads": 2, "unimodal_layers": 2, "fusion_layers": 2}
ON = ObjectiveConfig(weight=1.0)
OBJECTIVES = ObjectivesConfig(contrastive=ON, captioning=ON, masked_image=ON)


@pytest.mark.parametrize(
    "more",
    [{}, {"modalities": {"video": {}, "audio": {"expert": "ears"}}}, {"modalities": {"image": {}, "audio": {}}}, {"positions": "rotary"}],
    ids=str,
)
def test_parameters_are_those_of_the_model(more: dict[str, Any]) -> None:
    model = ModelConfig(**SHAPE, **more)
    counted = sum(p.numel() for p in MMScaleModel(mmscale_config(model, 100, {})).parameters())
    found = estimate(RunConfig(run="unused", model=model, objectives=OBJECTIVES), 1, bf16=True, vocabulary=100)
    assert found.parameters == counted
    assert found.checkpoint_bytes == 12 * counted


def test_state_of_one_rank_by_hand() -> None:
    config = RunConfig(run="unused", model=ModelConfig(**SHAPE), objectives=OBJECTIVES, zero=ZeroConfig(stage=1))
    found = estimate(config, 1, bf16=True, vocabulary=100)
    assert found.state_bytes == found.parameters * (2 + 2 + 12 + 2)  # weights, gradients, AdamW with masters, the bucket of gradients


def test_frozen_parameters_have_no_optimizer() -> None:
    config = RunConfig(run="unused", model=ModelConfig(**SHAPE), objectives=OBJECTIVES, train=TrainConfig(ema_decay=0.9))
    whole, adapters = (
        estimate(RunConfig(run="unused", model=config.model, objectives=OBJECTIVES, lora=lora), 2, bf16=True, vocabulary=100)
        for lora in (LoraConfig(), LoraConfig(rank=2))
    )
    assert adapters.parameters > whole.parameters
    assert adapters.state_bytes < whole.state_bytes
    assert adapters.checkpoint_bytes < whole.checkpoint_bytes
