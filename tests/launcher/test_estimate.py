"""What the launcher expects of a configuration, against the model that it describes."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.estimate import parameters
from mmscale.config import RunConfig
from mmscale.model import MMScaleModel, mmscale_config
from mmscale.model_config import ModelConfig
from mmscale.objectives_config import ObjectiveConfig, ObjectivesConfig

SHAPE = {"hidden_size": 64, "num_heads": 2, "unimodal_layers": 2, "fusion_layers": 2}
ON = ObjectiveConfig(weight=1.0)
OBJECTIVES = ObjectivesConfig(contrastive=ON, captioning=ON, masked_image=ON)


@pytest.mark.parametrize(
    "more",
    [{"modalities": {"video": {}, "audio": {"expert": "ears"}}}, {"modalities": {"image": {}, "audio": {}}}, {"positions": "rotary"}],
    ids=str,
)
def test_modalities_and_positions_change_the_estimate_as_they_change_the_model(more: dict[str, Any]) -> None:
    plain, other = (ModelConfig(**SHAPE, **keys) for keys in ({}, more))
    counted = [sum(p.numel() for p in MMScaleModel(mmscale_config(m, 100, {})).parameters()) for m in (plain, other)]
    estimated = [parameters(RunConfig(run="unused", model=m, objectives=OBJECTIVES), vocabulary=100) for m in (plain, other)]
    assert estimated[1] - estimated[0] == pytest.approx(counted[1] - counted[0], rel=0.05)
