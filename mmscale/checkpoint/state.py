"""What a checkpoint says about the run it belongs to, and whether this run may continue it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmscale.errors import CheckpointError, TopologyError
from mmscale.model_config import all_keys

NAME = "run.json"
_RESTORABLE = {
    "order": "`train.seed`, `data.order` and the weights of the steps done",
    "tokenizer": "`data.tokenizer`",
    "global_batch": "`train.global_batch`",
}
"""What to restore where one of these differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """The progress and identity of a run."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Samples consumed: the loader's whole state."""
    quarantined: int
    """Samples that did not decode."""
    skipped: int
    """Steps that were dropped because a loss or the gradient was not finite."""
    skipped_in_a_row: int
    """How many of these were the last ones before this checkpoint."""
    data: str
    """Digest of the data set."""
    order: str
    """Fingerprint of the global order (data set, seed, order version)."""
    tokenizer: str
    """Digest of the tokenizer."""
    model: dict[str, Any]
    """Shape of the model."""
    global_batch: int
    """Samples an optimizer step."""
    topology: dict[str, Any]
    """Ranks, micro-batch, accumulation, ZeRO stage and compute type."""
    objectives: dict[str, float]
    """Objectives and their weights."""
    config: dict[str, Any]
    """The whole configuration, for people."""
    versions: dict[str, str]
    """Versions of mmscale, torch, deepspeed, transformers and Python."""
    losses: list[float] = field(default_factory=list)
    """Those of the newest steps, where loss spikes are looked for."""


def write_state(folder: Path, state: RunState) -> Path:
    """Write run.json into a checkpoint that is being made."""
    path = folder / NAME
    path.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
    return path


def read_state(folder: Path) -> RunState:
    """Read run.json of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    path = folder / NAME
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e}. It is no checkpoint of this version of mmscale.") from e


def check_same_run(folder: Path, saved: RunState, now: RunState) -> None:
    """Refuse to continue a run with what would silently make it another one.

    Raises:
        CheckpointError: another model, data set, order, tokenizer or global batch.
        TopologyError: another compute type. Ranks, micro-batch and ZeRO stage may change.
    """
    start = f"The run's checkpoint {str(folder)!r} cannot be continued:"
    if changed := _differences(all_keys(saved.model), all_keys(now.model)):
        raise CheckpointError(f"{start} it is of another model ({changed}). Restore the model's configuration, or use a new `run` folder.")
    if (before := _task_of(saved.config)) != (after := _task_of(now.config)):
        raise CheckpointError(
            f"{start} it was trained for {before}, now it is to be for {after}. Restore `task` and `data.label`, or use a new `run` folder "
            "with init_from set to this checkpoint."
        )
    if saved.data != now.data:
        raise CheckpointError(
            f"{start} it is of another data set (digest {saved.data[:12]}, now {now.data[:12]}). Restore `data.shards`, or use a new `run` "
            "folder with init_from set to this checkpoint."
        )
    for name, keys in _RESTORABLE.items():
        before, after = getattr(saved, name), getattr(now, name)
        if before != after:
            raise CheckpointError(
                f"{start} its {name} was {_short(before)}, now it is {_short(after)}. Restore {keys}, or use a new `run` folder."
            )
    before, after = saved.topology["precision"], now.topology["precision"]
    if before != after:
        raise TopologyError(
            f"{start} its precision was {before}, now it is {after}. Restore `train.precision`, or use a new `run` folder "
            "with init_from set to this checkpoint."
        )


def _task_of(config: Mapping[str, Any]) -> str:
    """What a stage is trained for, as people would say it."""
    task, data = config.get("task"), config.get("data", {})
    if not task:
        return "no task"
    labels = "" if not data.get("labels") else f", data.labels={data['labels']}"
    return f"task.name={task['name']}, data.label={data.get('label')}{labels}"


def describe_change(saved: RunState, now: RunState) -> str | None:
    """Say how the topology differs from the one that a checkpoint was written on, or None where it does not."""
    return _differences(saved.topology, now.topology) or None


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    keys, unset = sorted(set(before) | set(after)), "not set"
    return ", ".join(f"{k} was {before.get(k, unset)}, now {after.get(k, unset)}" for k in keys if before.get(k) != after.get(k))


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
