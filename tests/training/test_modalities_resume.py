"""A run over sound, clips, series and pictures, with dropped patches and rotary positions, resumes bit for bit under ZeRO-3."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.data.test_streams import heard
from tests.data.tiny import tokenizer_folder, write
from tests.training.runs import audited, losses, records, train

STAGE = """
data:
  shards: {shards}
  tokenizer: {tokenizer}
  max_text_tokens: 16
  keep: {{image: 0.5, audio: {{0: 0.5, 3: 1.0}}}}
model:
  hidden_size: 32
  num_heads: 2
  unimodal_layers: 1
  fusion_layers: 1
  image_size: 16
  patch_size: 8
  max_text_tokens: 16
  projection_size: 16
  dropout: 0.1
  positions: rotary
  modalities:
    image: {{max_tokens: 12}}
    audio: {{mels: 16, patch: 8, max_seconds: 0.3, expert: ears}}
    video: {{frames: 2}}
    series: {{kind: "tests.modalities.series:Series"}}
objectives:
  contrastive: {{weight: 1}}
  matching: {{weight: 1}}
  masked_language: {{weight: 1, mask: 0.3}}
  captioning: {{weight: 1}}
  masked_image: {{weight: 1, mask: 0.5}}
train: {{steps: 6, global_batch: 8, seed: 1, precision: fp32, timeout_s: 300}}
optimizer: {{warmup_steps: 2, lr: 2e-3}}
zero: {{stage: 3}}
checkpoint: {{every: 2, keep: 0}}
quarantine: {{max_fraction: 0.5}}
log: {{every: 1, tensorboard: false}}
audit: {{samples: true}}
"""


@pytest.mark.slow
def test_a_run_of_all_modalities_resumes_bit_for_bit(tmp_path: Path) -> None:
    shards, tokenizer = write(tmp_path / "shards", heard, (8, 8)), tokenizer_folder(tmp_path / "tokenizer")
    stage = tmp_path / "stage.yaml"
    stage.write_text(STAGE.format(shards=shards, tokenizer=tokenizer))
    whole, again = tmp_path / "whole", tmp_path / "again"
    done = train(2, stage, f"run={whole}", timeout_s=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000002", again / "checkpoints" / "step-00000002")
    done = train(2, stage, f"run={again}", timeout_s=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "resumed from" in done.stdout
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert losses(again) == losses(whole)[2:]
    assert audited(again) == {position: line for position, line in audited(whole).items() if position >= 16}
    named = {record["key"] for record in records(whole / "quarantine.jsonl")}
    assert named == {"s4", "s7", "s12", "s15"}
