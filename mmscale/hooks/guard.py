"""Steps that were dropped because they were not finite: counted, named, and held to a budget."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from mmscale.hooks import StepInfo
from mmscale.late import Late
from mmscale.recovery_config import GuardConfig
from mmscale.run_folder import RunFolder, append_line, drop_torn_line, keep_lines_up_to
from mmscale.step import StepSums
from mmscale.watchdog import Section
from mmscale.world import World

logger = logging.getLogger(__name__)
KEYS_NAMED = 4
"""Samples that the log names; the file names all."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A step whose flag may still be on its way from the device."""

    step: int
    flag: Late
    sums: StepSums
    keys: list[list[str]]


class GuardHook:
    """Looks at each step's flag without waiting for the device: a step later there, at once on a CPU, and when somebody asks (`settle`).

    A dropped step has changed nothing, so that nothing is lost by learning of it late. Runs first: the log and the checkpoint ask it.
    """

    section: ClassVar[Section] = "step"

    def __init__(
        self,
        folder: RunFolder,
        config: GuardConfig,
        world: World,
        group: dist.ProcessGroup,
        names: Sequence[str],
        *,
        already: tuple[int, int] = (0, 0),
        resumed_at: int = 0,
        late: int | None = None,
    ) -> None:
        self.folder, self.config, self.world, self.group, self.names = folder, config, world, group, list(names)
        self.total, self.in_a_row = already
        self.failure: str | None = None
        self._late = (0 if world.device.type == "cpu" else 1) if late is None else late
        self._waiting: deque[_Waiting] = deque()
        if world.is_first:
            drop_torn_line(folder.skipped)
            keep_lines_up_to(folder.skipped, resumed_at)

    def after_step(self, info: StepInfo) -> None:
        """Take a step in, and look at those before it (all ranks call)."""
        self._waiting.append(_Waiting(info.step, Late(info.sums.skipped), info.sums, [b.keys for b in info.batch.host]))
        while len(self._waiting) > self._late:
            self._look(self._waiting.popleft())

    def settle(self) -> None:
        """Look at every step so far; waits for the device (all ranks call)."""
        while self._waiting:
            self._look(self._waiting.popleft())

    def close(self) -> None:
        """Nothing is held open."""

    def _look(self, step: _Waiting) -> None:
        if not step.flag.get().item():
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += not step.sums.passed_over
        found = self._gather([r for i in range(len(step.keys)) for r in self._findings(step, i)])
        if self.world.is_first:
            for record in found:
                append_line(self.folder.skipped, record)
            logger.warning("%s", self._line(step.step, found))
        config, allowed = self.config, max(self.config.max_count, self.config.max_fraction * step.step)
        if step.sums.passed_over and self.total > allowed:
            self.failure = (
                f"Step {step.step} was passed over, since the run was rolled back for a spike of its loss ({self.folder.rollbacks}): "
                f"{self.total} of {step.step} steps are left out, more than guard.max_fraction = {config.max_fraction:g} and "
                f"guard.max_count = {config.max_count} allow. Go on from the last checkpoint with a lower optimizer.lr or "
                "train.clip_norm, a higher guard.spike, or a higher guard.max_count."
            )
        elif self.in_a_row > config.max_consecutive or self.total > allowed:
            self.failure = (
                f"Step {step.step} was skipped because {_what(found)}: {self.in_a_row} in a row and {self.total} of {step.step} steps, "
                f"more than guard.max_consecutive = {config.max_consecutive}, or guard.max_fraction = {config.max_fraction:g} and "
                f"guard.max_count = {config.max_count}, allow. Ranks and samples are listed in {self.folder.skipped}. "
                "Skipped steps changed no weight: go on from the last checkpoint with a lower optimizer.lr or train.clip_norm, with "
                "train.precision=fp32, or without those samples."
            )

    def _findings(self, step: _Waiting, index: int) -> list[dict[str, Any]]:
        """What was not finite in one of this rank's micro-batches, or that it was passed over: a record, or none."""
        place = {"step": step.step, "rank": self.world.rank, "micro_step": index}
        if step.sums.passed_over:
            return [place | {"losses": {}, "gradient_only": False, "rolled_back": True, "keys": step.keys[index]}]
        sums_K, gradient = (t.double().cpu() for t in step.sums.micro[index])
        bad = {name: str(value) for name, value in zip(self.names, sums_K.tolist(), strict=True) if not torch.isfinite(torch.tensor(value))}
        if not bad and torch.isfinite(gradient):
            return []
        return [place | {"losses": bad, "gradient_only": not bad, "keys": step.keys[index]}]

    def _gather(self, mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, mine, group=self.group)
        return [record for part in parts for record in part]

    def _line(self, step: int, found: list[dict[str, Any]]) -> str:
        if any("rolled_back" in record for record in found):
            return f"step {step} passed over, since the run was rolled back for its loss ({self.folder.rollbacks}). {self.total} in all"
        parts = []
        for record in found[:KEYS_NAMED]:
            keys = record["keys"]
            more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
            parts.append(
                f"{_losses(record)} on rank {record['rank']}, micro-step {record['micro_step']} ({', '.join(keys[:KEYS_NAMED])}{more})"
            )
        parts += [f"and {len(found) - KEYS_NAMED} more micro-batches"] if len(found) > KEYS_NAMED else []
        parts = parts or ["the gradient norm over all ranks, while losses and gradients of each are finite"]
        return f"step {step} skipped, not finite: {'; '.join(parts)}. {self.in_a_row} in a row, {self.total} in all"


def _losses(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record["losses"].items()) or "gradient"


def _what(found: list[dict[str, Any]]) -> str:
    names = sorted({name for record in found for name in record["losses"]})
    ranks = sorted({record["rank"] for record in found})
    if not ranks:
        return "the gradient norm is not finite"
    what = f"the loss of {', '.join(names)}" if names else "the gradient"
    return f"{what} is not finite on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
