"""Run one reader in this process and print what it cost, as a line of JSON; `benchmarks/read.py` starts it in the reader's environment."""

from __future__ import annotations

import time

_BEGIN = time.perf_counter()

import argparse  # noqa: E402  (the imports are part of what is measured)
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import pickle  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import psutil  # noqa: E402

from benchmarks.readers import Options  # noqa: E402

STEADY = (0.1, 0.9)
"""Parts of an epoch between which the steady cost is taken: start-up, and queues that fill and drain, lie outside."""


def cpu_seconds() -> float:
    """CPU time of this process, of its ended children and of all its living descendants."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_mb() -> float:
    """Proportional set size of this process and all its descendants: shared pages are counted once."""
    found = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            found += process.memory_full_info().pss / 2**20
        except psutil.NoSuchProcess:
            continue
    return found


def epoch(reader: Any, rows: int, opened: float) -> dict[str, float]:
    """Read one epoch of `rows` samples and say what it cost."""
    found: dict[str, float] = {"samples": 0, "memory_mb": 0.0}
    marks: list[tuple[int, float, float]] = []
    wanted = [part * rows for part in STEADY]
    for keys, images in reader:
        assert images.shape[0] == len(keys)
        if not found["samples"]:
            found["first_batch_s"] = time.perf_counter() - opened
            found["start_s"] = time.perf_counter() - _BEGIN
        found["samples"] += len(keys)
        if len(marks) < len(wanted) and found["samples"] >= wanted[len(marks)]:
            if not marks and hasattr(reader, "settle"):
                reader.settle()
            marks.append((int(found["samples"]), cpu_seconds(), time.perf_counter()))
            if len(marks) == len(wanted):
                found["memory_mb"] = memory_mb()
    (first, first_cpu, first_s), (last, last_cpu, last_s) = marks
    found["cpu_ms"] = 1000 * (last_cpu - first_cpu) / (last - first)
    found["samples_per_s"] = (last - first) / (last_s - first_s)
    return found


def part(batches: Iterator[tuple[list[str], Any]], stop: int | None, opened: float) -> dict[str, Any]:
    """Read to the end of the epoch, or until `stop` samples were read, and say which they were."""
    keys: list[str] = []
    found: dict[str, Any] = {"keys": keys, "pixels": 0, "first_batch_s": None}
    for batch, images in batches:
        if found["first_batch_s"] is None:
            found["first_batch_s"] = time.perf_counter() - opened
        keys += batch
        found["pixels"] += sum(zlib.crc32(bytes(memoryview(image.numpy() if hasattr(image, "numpy") else image))) for image in images)
        if stop is not None and len(keys) >= stop:
            break
    return found


def main() -> None:
    """Open, read, print."""
    parser = argparse.ArgumentParser()
    for name in ("--reader", "--folder", "--mode"):
        parser.add_argument(name, required=True)
    for name in ("--workers", "--rank", "--rows"):
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--stop", type=int)
    for name in ("--tars", "--load", "--save"):
        parser.add_argument(name, type=Path)
    words = parser.parse_args()
    module = importlib.import_module(f"benchmarks.readers.{words.reader}")
    state = pickle.loads(words.load.read_bytes()) if words.load else None
    imported = time.perf_counter() - _BEGIN
    if words.mode == "prepare":
        module.prepare(words.tars, Path(words.folder))
        return
    opened = time.perf_counter()
    reader = module.Reader(Options(folder=Path(words.folder), workers=words.workers, rank=words.rank, size=words.size, state=state))
    if words.mode == "epoch":
        found = epoch(reader, words.rows, opened)
    else:
        batches = iter(reader)
        found = part(batches, words.stop, opened)
        if words.save:
            words.save.write_bytes(pickle.dumps(reader.state()))
        del batches
    del reader
    found |= {
        "import_s": imported,
        "cpu_ms_with_start": 1000 * cpu_seconds() / max(1, len(found.get("keys", [])) or found.get("samples", 1)),
    }
    print(json.dumps(found), flush=True)
    os._exit(0)  # readers whose threads or processes do not end by themselves


if __name__ == "__main__":
    main()
