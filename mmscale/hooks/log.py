"""The run's numbers: console, metrics.jsonl, TensorBoard, status.json."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from mmscale.board import add_scalars, open_board
from mmscale.data.batch import Batch
from mmscale.data.statistics import Work
from mmscale.guard import Gate
from mmscale.hooks import StepInfo, due
from mmscale.hooks.guard import GuardHook
from mmscale.own_time import OwnTime, Straggler
from mmscale.run_folder import RunFolder, append_line, drop_torn_line, keep_lines_up_to, strict
from mmscale.watchdog import Section
from mmscale.world import World

logger = logging.getLogger(__name__)


class LogHook:
    """Every so many steps: reduces what was summed up over ranks and writes it out from rank 0.

    Losses and logged means are those of the logged step alone, so that they can be compared bit for bit; rates are means over the steps
    since the last line.
    """

    section: ClassVar[Section] = "step"

    def __init__(
        self,
        folder: RunFolder,
        world: World,
        gate: Gate,
        objectives: Sequence[Any],
        guard: GuardHook,
        *,
        every: int,
        steps: int,
        resumed_at: int,
        rows: int,
        flops: Callable[[Batch], float],
        peak_flops: float | None,
        tensorboard: bool,
        stalled_s: Callable[[], float],
    ) -> None:
        self.folder, self.world, self.gate, self.objectives, self.guard = folder, world, gate, objectives, guard
        self.every, self.steps, self.rows = every, steps, rows
        self.flops, self.peak_flops, self.stalled_s = flops, peak_flops, stalled_s
        self.board = open_board(folder.tensorboard, resumed_at) if tensorboard and world.is_first else None
        if world.is_first:
            drop_torn_line(folder.metrics)
            keep_lines_up_to(folder.metrics, resumed_at)
        self.window = _Window(resumed_at, stalled_s(), is_first=True)
        self.straggler = Straggler()

    def after_step(self, info: StepInfo) -> None:
        """Count the step in, and write a line when one is due."""
        self.window.add(info, sum(self.flops(batch) for batch in info.batch.host))
        if due(info.step, self.every, info.last):
            record = self._record(info)
            self.window = _Window(info.step, self.stalled_s())
            if self.world.is_first:
                self._write(record)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()

    def _record(self, info: StepInfo) -> dict[str, Any]:
        losses, logs = info.sums.reduce()
        self.guard.settle()
        elapsed = time.perf_counter() - self.window.start
        steps = info.step - self.window.step
        sums, wait_s, ready = self.window.reduce(self.world)
        samples, tokens, flops = (sums[name] for name in ("samples", "tokens", "flops"))
        weighted = [o.weight * loss for o, loss in zip(self.objectives, losses, strict=True)]
        norm = None if info.sums.passed_over else self.gate.norm
        mfu = flops / elapsed / (self.peak_flops * self.world.size) if self.peak_flops else None
        record = {"step": info.step, "samples_seen": info.samples_seen, "epoch": info.samples_seen / self.rows, "loss": sum(weighted)}
        record |= {f"loss/{o.name}": loss for o, loss in zip(self.objectives, losses, strict=True)} | logs
        group = self.gate.engine.optimizer.param_groups[0]
        record |= {"grad_norm": None if norm is None else float(norm), "lr": group["lr"] / group.get("lr_factor", 1.0)}
        record |= {"samples_per_s": samples / elapsed, "tokens_per_s": tokens / elapsed, "mfu": mfu, "step_s": elapsed / steps}
        record |= {
            "data_wait_s": wait_s / steps,
            "save_stall_s": self.stalled_s() - self.window.stalled_s,
            "memory": _peak_memory(self.world.device),
        }
        record |= {"quarantined": info.sums.quarantined, "skipped_steps": self.guard.total}
        if self.world.size > 1:
            record |= self.straggler.look([sums[f"own/{rank}"] for rank in range(self.world.size)])
        return record | _reading(sums, ready, elapsed)

    def _write(self, record: dict[str, Any]) -> None:
        append_line(self.folder.metrics, strict(record))
        eta_s = (self.steps - record["step"]) * record["step_s"]
        rate = {k: record[k] for k in ("loss", "samples_per_s", "mfu", "data_wait_s", "step_s")}
        self.folder.write_status("running", step=record["step"], steps=self.steps, eta_s=eta_s, **strict(rate))
        logger.info("%s", console_line(record, self.steps, eta_s))
        if (warning := self.straggler.warning()) is not None:
            logger.warning("%s", warning)
        if self.board is not None:
            add_scalars(self.board, {name: value for name, value in record.items() if name != "step"}, record["step"])


class _Window:
    """Sums of this rank since the last logged line.

    Args:
        step: the last one before it.
        stalled_s: what saving has cost so far.
        is_first: of a launch: its first batch was waited for before the clock started, together with what made the model and the loader.
    """

    def __init__(self, step: int, stalled_s: float, is_first: bool = False) -> None:
        self.step, self.stalled_s, self.is_first = step, stalled_s, is_first
        self.start = time.perf_counter()
        self.samples = self.tokens = 0
        self.flops = self.wait_s = 0.0
        self.work, self.ready = Work(), 0
        self.own = OwnTime()

    def add(self, info: StepInfo, flops: float) -> None:
        """Count a step in."""
        self.samples += sum(b.size for b in info.batch.host)
        self.tokens += sum(b.tokens for b in info.batch.host)
        self.flops += flops
        if not (self.is_first and info.step == self.step + 1):
            self.wait_s += info.batch.wait_s
        self.work += info.batch.work
        self.ready = info.batch.ready
        self.own.add(info.sums.own)

    def reduce(self, world: World) -> tuple[dict[str, float], float, int]:
        """Bring the ranks together (all ranks call).

        Returns:
            Sums over all ranks: samples, tokens, FLOPs, the loader's work and, as `store/NAME`, the store's; as `own/RANK` each
            rank's own seconds; the longest data wait of a rank; the fewest batches that lie ready on a rank.
        """
        local = {"samples": self.samples, "tokens": self.tokens, "flops": self.flops, "read": self.work.samples, "bytes": self.work.bytes}
        local |= {"read_s": self.work.read_s, "decode_s": self.work.decode_s}
        local |= {f"store/{name}": count for name, count in asdict(self.work.store).items()}
        local |= {f"own/{rank}": 0.0 for rank in range(world.size)} | {f"own/{world.rank}": self.wait_s + self.own.seconds()}
        sums = torch.tensor(list(local.values()), dtype=torch.float64, device=world.device)
        most = torch.tensor([self.wait_s, -self.ready], dtype=torch.float64, device=world.device)
        dist.all_reduce(sums)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        wait_s, unready = most.tolist()
        return dict(zip(local, sums.tolist(), strict=True)), wait_s, -int(unready)


def _reading(sums: dict[str, float], ready: int, elapsed: float) -> dict[str, float]:
    """What reading took since the last line, over all ranks; the store's counts only where one was asked."""
    count = max(1.0, sums["read"])
    found = {"read_ms": 1000 * sums["read_s"] / count, "decode_ms": 1000 * sums["decode_s"] / count}
    found |= {"bytes_per_s": sums["bytes"] / elapsed, "batches_ready": ready}
    store = {name: count for name, count in sums.items() if name.startswith("store/")}
    return found | (store if any(store.values()) else {})


def console_line(record: dict[str, Any], steps: int, eta_s: float) -> str:
    """Render a record for a person."""
    parts = [f"step {record['step']:>6}/{steps}", f"loss {record['loss']:.4f}"]
    parts += [f"{name.removeprefix('loss/')} {value:.3f}" for name, value in record.items() if name.startswith("loss/")]
    parts += [f"lr {record['lr']:.2e}", f"{record['samples_per_s']:,.0f} samples/s"]
    parts += [] if record["mfu"] is None else [f"MFU {record['mfu']:.1%}"]
    parts += [f"data wait {record['data_wait_s'] / record['step_s']:.0%}", f"ETA {format_duration(eta_s)}"]
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Render seconds as 0:03:20 or 2d 03:20:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the accelerator, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
