"""Which samples were read: the audit, the quarantine and its budget."""

from __future__ import annotations

import json
from typing import ClassVar

from mmscale.config import QuarantineConfig
from mmscale.hooks import StepInfo
from mmscale.run_folder import RunFolder, append_line, drop_torn_line
from mmscale.watchdog import Section
from mmscale.world import World
from shards.errors import BudgetError


class AuditHook:
    """Writes audit/rank-N.jsonl, a line a sample. Runs before the checkpoint hook: what a checkpoint has seen is on file."""

    section: ClassVar[Section] = "step"

    def __init__(self, folder: RunFolder, world: World) -> None:
        path = folder.audit(world.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        self.file = path.open("a", encoding="utf-8")

    def after_step(self, info: StepInfo) -> None:
        """Append the samples of this rank."""
        for position, key in zip(info.batch.positions, info.batch.keys, strict=True):
            self.file.write(json.dumps({"step": info.step, "position": position, "key": key}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class QuarantineHook:
    """Writes quarantine.jsonl and ends the run when too many samples are bad."""

    section: ClassVar[Section] = "step"

    def __init__(self, folder: RunFolder, config: QuarantineConfig, already: int, world: World) -> None:
        self.folder = folder
        self.config = config
        self.total = already
        if world.is_first:
            drop_torn_line(folder.quarantine)

    def after_step(self, info: StepInfo) -> None:
        """Record this rank's bad samples and check the budget over all ranks (the same on every rank)."""
        for position, key, error in info.batch.quarantined:
            append_line(self.folder.quarantine, {"step": info.step, "position": position, "key": key, "error": error})
        self.total += info.sums.quarantined
        allowed = max(self.config.max_count, self.config.max_fraction * info.samples_seen)
        if self.total > allowed:
            raise BudgetError(
                f"{self.total} of {info.samples_seen} samples did not decode, more than quarantine.max_count = {self.config.max_count} and "
                f"quarantine.max_fraction = {self.config.max_fraction:g} allow. They are listed in {self.folder.quarantine}. "
                "Verify the shards with `mmscale shards verify`, or raise the budget."
            )

    def close(self) -> None:
        """Nothing is held open."""
