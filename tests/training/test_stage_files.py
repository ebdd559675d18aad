"""Every stage file that comes with mmscale is one: it loads, and its objectives, its task and its batches can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.config import CONFIGS, load_run_config
from mmscale.data.plan import StreamPlan
from mmscale.objectives import build_objectives
from mmscale.tasks import build_task

STAGES = sorted(path for folder in ("pretrain", "finetune") for path in (CONFIGS / folder).glob("*.yaml"))
STAGES += [CONFIGS / "demo" / "pretrain.yaml", CONFIGS / "demo" / "finetune.yaml"]


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_stage_file_is_a_stage(path: Path) -> None:
    config = load_run_config(path, [])
    assert build_objectives(config)
    plan = StreamPlan.from_config(config, training=True, has_mask=True)
    assert plan.image or plan.text or plan.caption
    if config.task is not None:
        assert build_task(config).name == config.task.name
    wrong = [line for line in path.read_text().splitlines() if len(line) > 160]
    assert not wrong
