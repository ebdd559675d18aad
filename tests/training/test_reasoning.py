"""Two images a sample: from NLVR2's files to shards, a trained model and its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmscale.evaluate import evaluate_command
from mmscale.tasks.reasoning import Reasoning
from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards
from tests.shards.published import json_lines
from tests.training.alone import Alone

STAGE = """
data: {caption: null, text: sentence, label: label, max_text_tokens: 16}
model: {hidden_size: 32, num_heads: 2, unimodal_layers: 1, fusion_layers: 2, image_size: 16, patch_size: 8, max_text_tokens: 16,
        projection_size: 16, modalities: {video: {frames: 2, tubelet: 1}}}
task: {name: reasoning}
train: {steps: 150, global_batch: 32, seed: 1, precision: fp32, timeout_s: 120}
optimizer: {warmup_steps: 10, lr: 3e-3}
log: {every: 50, tensorboard: false}
"""


def pairs(root: Path) -> Path:
    """A sentence each about two pairs of greys: the left one is brighter, or the right one; half of them are true."""
    rows = []
    for number in range(80):
        generator = np.random.default_rng(number // 2)
        low, high = sorted(generator.choice(16, 2, replace=False).tolist())
        side, told = ("left", "right")[number % 2], ("left", "right")[number // 2 % 2]
        name = f"dev-{number // 2}-{number % 2}"
        (root / "dev").mkdir(parents=True, exist_ok=True)
        for image, bright in enumerate((high, low) if side == "left" else (low, high)):
            Image.fromarray(np.full((16, 16, 3), 16 * bright + 4, np.uint8)).save(root / "dev" / f"{name}-img{image}.png")
        sentence = {"sentence": f"the {told} image is brighter", "label": str(side == told), "left_url": "x", "right_url": "y"}
        rows.append(sentence | {"identifier": f"{name}-0"})
    return json_lines(root / "data" / "dev.json", rows)


@pytest.mark.slow
def test_pairs_are_compared(tmp_path: Path, alone: Alone) -> None:
    words = ["source=nlvr", f"path={pairs(tmp_path)}", f"out={tmp_path / 'shards'}", "processes=1"]
    words += ["tokenizer.kind=wordpiece", "tokenizer.fields=[sentence]", "tokenizer.vocab_size=100"]
    summary = write_shards(configfile.load(WriteConfig, None, words), progress=False)
    assert (summary.written, summary.quarantined.total()) == (80, 0)
    stage, run = tmp_path / "stage.yaml", tmp_path / "run"
    stage.write_text(STAGE.replace("data: {", f"data: {{shards: {tmp_path / 'shards'}, "))
    code, out, err = alone(stage, f"run={run}")
    assert code == 0, out + err
    metrics = evaluate_command(run, None, ["task=reasoning", f"data={tmp_path / 'shards'}", "device=cpu"])
    assert metrics["accuracy"] > 0.9
    assert metrics["groups"] == 40
    assert 0.8 < metrics["consistency"] <= metrics["accuracy"]


def test_consistency_counts_groups_that_are_right_throughout() -> None:
    task = Reasoning("reasoning", "label")
    base = {"label": "true", "confidence": 0.5, "class": 0, "probabilities": np.array([0.5, 0.5], np.float32)}
    said = [("a", "true"), ("a", "false"), ("b", "true"), ("b", "true"), (None, "true"), (None, "false")]
    made = [base | {"position": n, "prediction": p} | task.kept_of({"group": g}) for n, (g, p) in enumerate(said)]
    scores = task.score(made)
    assert (scores["accuracy"], scores["consistency"], scores["groups"]) == (pytest.approx(4 / 6), 2 / 4, 4)
