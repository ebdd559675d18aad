"""Which runs are the same one: keys that an older version did not know mean their defaults."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint.state import RunState, check_same_run
from mmscale.errors import CheckpointError
from mmscale.model_config import ModelConfig, TextTowerConfig
from shards import configfile


def state(model: dict[str, Any]) -> RunState:
    counts = {"step": 1, "samples_seen": 4, "quarantined": 0, "skipped": 0, "skipped_in_a_row": 0, "global_batch": 4}
    names = {"data": "d", "order": "o", "tokenizer": "t", "topology": {"precision": "fp32"}, "objectives": {}, "config": {}, "versions": {}}
    return RunState(**counts, **names, model=model)


def section(**changes: Any) -> dict[str, Any]:
    return configfile.to_plain(ModelConfig(**changes)) | {"vocab_size": 9}


AUDIO = {"kind": "audio", "mels": 16, "patch": 8, "stem": 0, "patch_frames": None}
NOW = section(modalities={"audio": AUDIO, "other": {"kind": "gone.module:Class", "x": 1}}, text=TextTowerConfig(table_std=1.0))


def older(model: dict[str, Any]) -> dict[str, Any]:
    """As a version saved it that knew neither these keys nor stems and convolutions."""
    found = {k: v for k, v in model.items() if k not in ("head_pooling", "rotary_base", "positions")}
    for tower in ("text", "image"):
        found[tower] = {k: v for k, v in model[tower].items() if k != "convolution"}
    audio = {k: v for k, v in model["modalities"]["audio"].items() if k not in ("stem", "patch_frames", "kind")}
    return found | {"modalities": model["modalities"] | {"audio": audio}}


def test_a_run_of_an_older_version_goes_on() -> None:
    assert older(NOW) != NOW
    check_same_run(Path("c"), state(older(NOW)), state(NOW))
    check_same_run(Path("c"), state(NOW), state(older(NOW)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_pooling": "concat"}, "head_pooling was first, now concat"),
        ({"text": asdict(TextTowerConfig(table_std=1.0, convolution=True))}, r"text\.convolution was False, now True"),
        ({"modalities": NOW["modalities"] | {"audio": AUDIO | {"stem": 8}}}, r"modalities\.audio\.stem was 0, now 8"),
        ({"modalities": NOW["modalities"] | {"other": {"kind": "gone.module:Class", "x": 2}}}, r"modalities\.other\.x was 1, now 2"),
        ({"vocab_size": 10}, "vocab_size was 9, now 10"),
    ],
)
def test_one_of_another_model_does_not(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot be continued: it is of another model \({said}\)\. Restore"):
        check_same_run(Path("c"), state(older(NOW)), replace(state(NOW), model=NOW | change))


def test_one_of_another_label_does_not() -> None:
    def of(label: str | None, labels: list[str] | None = None) -> RunState:
        task = None if label is None else {"name": "classification"}
        return replace(state(NOW), config={"task": task, "data": {"label": label, "labels": labels}})

    check_same_run(Path("c"), of("a"), of("a"))
    for after, said in ((of("b"), r"data\.label=b"), (of("a", ["x"]), r"data\.label=a, data\.labels=\['x'\]"), (of(None), "no task")):
        with pytest.raises(
            CheckpointError, match=rf"trained for task\.name=classification, data\.label=a, now it is to be for .*{said}\. Res"
        ):
            check_same_run(Path("c"), of("a"), after)
