"""The run folder: where each file lives, and the small ones that are replaced whole."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run.

    config.yaml  metrics.jsonl  tensorboard/  checkpoints/step-00000100/  logs/rank-*.log  status.json  quarantine.jsonl
    skipped.jsonl  rollbacks.jsonl  audit/  stacks/rank-*.txt  nodes.json
    """

    path: Path

    @property
    def config(self) -> Path:
        """The configuration that the newest launch ran with."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints, and what is being written."""
        return self.path / "checkpoints"

    @property
    def status(self) -> Path:
        """What the run is doing, for people and launchers on any host."""
        return self.path / "status.json"

    @property
    def quarantine(self) -> Path:
        """A line a sample that did not decode."""
        return self.path / "quarantine.jsonl"

    @property
    def skipped(self) -> Path:
        """What was not finite in the steps that were dropped: a line a micro-batch."""
        return self.path / "skipped.jsonl"

    @property
    def rollbacks(self) -> Path:
        """A line a loss spike that the run was rolled back for, with the steps that it passes over since."""
        return self.path / "rollbacks.jsonl"

    @property
    def evaluations(self) -> Path:
        """A line an evaluation during training."""
        return self.path / "evaluations.jsonl"

    @property
    def nodes(self) -> Path:
        """What the newest check of the nodes found."""
        return self.path / "nodes.json"

    def log(self, rank: int) -> Path:
        """Log file of a rank."""
        return self.path / "logs" / f"rank-{rank}.log"

    def stacks(self, rank: int) -> Path:
        """Where the threads of a rank stood when a section took too long."""
        return self.path / "stacks" / f"rank-{rank}.txt"

    def audit(self, rank: int) -> Path:
        """Audit file of a rank: a line a sample."""
        return self.path / "audit" / f"rank-{rank}.jsonl"

    def make(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(
                f"The run folder {str(self.path)!r} cannot be made: {e.strerror}. Give another `run`, in a folder that can be written to."
            ) from e

    def write_status(self, state: str, **values: Any) -> None:
        """Replace status.json; `state` is running, finished, stopped, failed, or stuck (exit code 86)."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"state": state, "pid": os.getpid(), "host": os.uname().nodename, "time": time.time()}
        launch = os.environ.get("MMSCALE_LAUNCH_ID")
        replace_file(self.status, json.dumps(record | ({"launch_id": launch} if launch else {}) | values) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader, or a machine that loses power, finds the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Make a file's content, or the names inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop the records of steps after `step`: a resumed run takes those again."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read_lines(path) if record["step"] <= step]
        replace_file(path, "".join(kept))


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left unfinished, so that appended lines stay whole."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(path, whole)


def strict(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite by None: JSON has none of them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
