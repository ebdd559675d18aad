"""A run over mixed sounds resumes bit for bit, and learns the same however its batch is divided."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.data.tiny import tokenizer_folder, write
from tests.shards.recordings import tone
from tests.training.runs import audited, losses, train

STAGE = """
data:
  shards: {shards}
  tokenizer: {tokenizer}
  caption: null
  text: null
  label: answer
  keep: {{audio: 0.5}}
  augment: {{roll: 0.5, gain: 3.0, time_mask: 0.2, frequency_mask: 0.2, mixup: 0.4, cutmix: 1.0}}
model:
  hidden_size: 32
  num_heads: 2
  unimodal_layers: 1
  fusion_layers: 1
  projection_size: 16
  modalities:
    audio: {{mels: 16, patch: 8, max_seconds: 0.4}}
task: {{name: classification}}
train: {{steps: 6, global_batch: 8, seed: 1, precision: fp32, timeout_s: 300}}
optimizer: {{warmup_steps: 2, lr: 2e-3}}
checkpoint: {{every: 2, keep: 0}}
log: {{every: 1, tensorboard: false}}
audit: {{samples: true}}
"""


def sound(index: int) -> dict[str, bytes]:
    label = ("low", "high")[index % 2]
    return {"wav": tone(0.2 + 0.02 * (index % 8), hertz=300.0 * (1 + index % 2) + index), "json": json.dumps({"answer": label}).encode()}


@pytest.mark.slow
def test_a_run_over_mixed_sounds_resumes_and_divides_exactly(tmp_path: Path) -> None:
    shards, tokenizer = write(tmp_path / "shards", sound, (12, 9)), tokenizer_folder(tmp_path / "tokenizer")
    stage = tmp_path / "stage.yaml"
    stage.write_text(STAGE.format(shards=shards, tokenizer=tokenizer))

    def run(name: str, *words: str, ranks: int = 1) -> Path:
        done = train(ranks, stage, f"run={tmp_path / name}", *words, timeout_s=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return tmp_path / name

    whole, again = run("whole"), tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000002", again / "checkpoints" / "step-00000002")
    run("again")
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert losses(again) == losses(whole)[2:]
    assert audited(again) == {position: line for position, line in audited(whole).items() if position >= 16}
    for name, ranks, words in (("accumulated", 1, ["train.micro_batch=2"]), ("shared", 2, ["train.micro_batch=2", "zero.stage=3"])):
        divided = run(name, *words, ranks=ranks)
        for (step, expected), (_, found) in zip(losses(whole), losses(divided), strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), (name, step)
