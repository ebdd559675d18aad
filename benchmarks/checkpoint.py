"""Checkpoints: what a save stalls, in the foreground and in the background, against the disk's rate; what loading and exporting take.

    python benchmarks/checkpoint.py [--parameters 300e6] [--folder .] [--repeats 3] [--out benchmarks/results/checkpoint.json]

One rank holds fp32 weights and two moments of so many parameters and saves them through the same functions as a run. The disk's rate is
that of plain writes of as many bytes, followed by one fsync, in between: the faster of those through the page cache and past it (O_DIRECT).
Ratios are of medians in one process.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmscale.checkpoint.background import BackgroundSave, Snapshot
from mmscale.checkpoint.commit import Contents, commit
from mmscale.checkpoint.export import export_model
from mmscale.checkpoint.find import name_of
from mmscale.checkpoint.fingerprint import fingerprint
from mmscale.checkpoint.manifest import find_fault
from mmscale.checkpoint.model_folder import MODEL
from mmscale.checkpoint.pieces import Piece
from mmscale.checkpoint.reader import StateReader

WIDTH = 1024
KINDS = ("master", "exp_avg", "exp_avg_sq")
LIMITS = {"stall_over_sync": (0.0, 0.1), "sync_rate_over_disk": (0.8, float("inf")), "export_memory_over_shard": (0.0, 1.2)}
"""What each ratio is to lie between."""


def timed(action: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def state_of(parameters: int) -> list[Piece]:
    """Weights and moments of blocks of a Transformer's shapes, until there are so many parameters."""
    pieces, total, block = [], 0, 0
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,)}
    while total < parameters:
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            total += size
            pieces += [Piece(kind, f"blocks.{block}.{name}", shape, 0, torch.randn(size), False) for kind in KINDS]
        block += 1
    return pieces


def write_plainly(path: Path, size: int, flags: int) -> None:
    """Write so many bytes and have them on disk: the limit. From whole pages, as direct writes want it."""
    chunk = mmap.mmap(-1, 16 << 20)
    chunk.write(os.urandom(16 << 20))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
    for _ in range(-(-size // len(chunk))):
        os.write(descriptor, chunk)
    os.fsync(descriptor)
    os.close(descriptor)
    path.unlink()


def documents(attempt: Path) -> list[Path]:
    """A stand-in for the model's configuration."""
    (attempt / MODEL).mkdir()
    (attempt / MODEL / "config.json").write_text("{}")
    return [attempt / MODEL / "config.json"]


def measure(folder: Path, parameters: int, repeats: int) -> dict[str, Any]:
    """Save, load and export in turns."""
    dist.init_process_group("gloo", init_method=f"file://{folder.resolve()}/rendezvous", rank=0, world_size=1)
    group: Any = dist.group.WORLD
    pieces = state_of(parameters)
    size = sum(p.values.numel() * 4 for p in pieces)
    snapshot, background = Snapshot(), BackgroundSave()
    snapshot.take(pieces)  # the first save of a run also gets the memory
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", "direct", "sync", "stall", "background", "verify", "load")}
    checkpoint = folder / name_of(1)
    for _ in range(repeats):
        for name, flags in (("plain", 0), ("direct", os.O_DIRECT)):
            seconds[name].append(timed(lambda flags=flags: write_plainly(folder / "plain", size, flags)))
        shutil.rmtree(checkpoint, ignore_errors=True)
        seconds["sync"].append(timed(lambda: commit(folder, Contents(1, pieces, {}, documents), group)))
        shutil.rmtree(checkpoint)
        start = time.perf_counter()
        copies = snapshot.take(pieces)
        background.start(1, lambda copies=copies: commit(folder, Contents(1, copies, {}, documents), group))  # type: ignore[misc]
        seconds["stall"].append(time.perf_counter() - start)
        outcome = background.collect(wait=True)
        assert outcome is not None
        assert outcome.error is None, outcome.error
        seconds["background"].append(outcome.seconds)
        seconds["verify"].append(timed(lambda: find_fault(checkpoint)))
        seconds["load"].append(timed(lambda: load(checkpoint, pieces)))
    medians = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "stall_over_sync": medians["stall_s"] / medians["sync_s"],
        "sync_rate_over_disk": statistics.median(
            min(p, d) / s for p, d, s in zip(seconds["plain"], seconds["direct"], seconds["sync"], strict=True)
        ),
        "sync_GB_per_s": size / medians["sync_s"] / 1e9,
    }
    return {"parameters": sum(p.values.numel() for p in pieces[::3]), "bytes": size} | medians | ratios | export_in_child(folder)


def load(checkpoint: Path, pieces: list[Piece]) -> None:
    """Read every tensor into its place and compare its hash, as a resume does."""
    reader = StateReader(checkpoint)
    for piece in pieces:
        piece.values.copy_(reader.read(piece.kind, piece.name))
        assert f"{fingerprint(piece.values):016x}" == reader.entry(piece.kind, piece.name).fingerprint


def export_in_child(folder: Path) -> dict[str, Any]:
    """Export in a fresh process, whose memory is its own."""
    done = subprocess.run([sys.executable, __file__, "--export", str(folder)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def export(folder: Path) -> dict[str, Any]:
    """Export; anonymous memory counts, the mapped pages of the checkpoint's files do not: the system takes them back at will."""
    before = resident_bytes()
    with watching() as peak:
        seconds = timed(lambda: export_model(folder / name_of(1), folder / "exported", shard_bytes=256 << 20))
    shard = max(p.stat().st_size for p in (folder / "exported").glob("*.safetensors"))
    return {"export_s": seconds, "export_memory_over_shard": (peak[0] - before) / shard, "largest_shard": shard}


@contextmanager
def watching() -> Iterator[list[int]]:
    """Look at this process's anonymous memory all the time; the largest seen."""
    peak, ended = [resident_bytes()], threading.Event()

    def look() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def resident_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=300e6)
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write: the disk that is measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        print(json.dumps(export(options.export)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), int(options.parameters), options.repeats)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    result = {"date": datetime.now(timezone.utc).date().isoformat()} | machine | result
    result["missed"] = [name for name, (low, high) in LIMITS.items() if not low <= result[name] <= high]
    for name, value in result.items():
        print(f"{name:<28}{value:.4g}" if isinstance(value, float) else f"{name:<28}{value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
