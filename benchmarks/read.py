"""Ours against webdataset, megatron-energon, mosaicml-streaming and litdata over the same samples, and against the limit of decoding.

    python benchmarks/read.py --venvs DIR [--rounds 5] [--readers NAME ...] [--out benchmarks/results/read.json]

12 x 1,000 JPEGs of 256 x 256, and as many of 640 x 480; one decoder for all (`readers/picture.py`), batches of 64, uint8, shuffled. Each
reader runs in a process of its own, in a virtual environment of its own that is made where DIR lacks it; rounds alternate the readers, so
that a change of the machine's load hits all, and medians are kept. Each epoch is one process. CPU time is that of the process and of all
it started, between a tenth and nine tenths of the epoch; `cpu_ms_with_start` is all of it, the interpreter's start and imports included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from benchmarks.readers import report  # noqa: E402
from benchmarks.readers.images import write_images  # noqa: E402

PEERS = {
    "webdataset": "webdataset==1.0.2",
    "energon": "megatron-energon==7.4.1",
    "streaming": "mosaicml-streaming==0.13.0",
    "litdata": "litdata==0.2.76",
}
OURS = ("mmscale_threads", "mmscale_steps", "mmscale_dataset")
TORCH = "torch==2.13.0"
SETS = {"256x256": (256, 256), "640x480": (640, 480)}
WORKERS = (0, 2)
RESUME_AT = 0.9
OTHER = (2, 1)
"""Ranks and workers of the resume on another topology; it is saved on 1 rank with 2 workers."""


def python_of(reader: str, venvs: Path) -> str:
    """Return the interpreter of a reader, its environment made where there is none."""
    if reader not in PEERS:
        return sys.executable
    folder = venvs / PEERS[reader].partition("==")[0]
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, TORCH], check=True)  # first, or a peer would pull another
        subprocess.run([*install, TORCH, PEERS[reader], "simplejpeg", "pillow", "psutil"], check=True)
    return str(python)


class Bench:
    """Starts readers as processes.

    Args:
        place: folder of the data sets.
        venvs: folder of the environments.
        rows: samples of a data set.
    """

    def __init__(self, place: Path, venvs: Path, rows: int) -> None:
        self.place, self.venvs, self.rows = place, venvs, rows

    def folder(self, reader: str, kind: str) -> Path:
        """Return the folder that a reader reads, made from the tars where there is none."""
        folder = self.place / kind / reader
        if not folder.exists():
            done = self.finish(self.start(reader, kind, "prepare", folder, tars=self.place / kind / "tars"))
            if "error" in done:
                shutil.rmtree(folder, ignore_errors=True)
                sys.exit(f"{reader} cannot prepare its data: {done['error']}")
        return folder

    def start(self, reader: str, kind: str, mode: str, folder: Path | None = None, *, rank: int = 0, size: int = 1, **words: Any) -> Any:
        """Start one process."""
        arguments = {"reader": reader, "folder": folder or self.folder(reader, kind), "mode": mode, "rank": rank, "size": size, **words}
        command = [python_of(reader, self.venvs), "-m", "benchmarks.readers.measure"]
        command += [word for name, value in arguments.items() if value is not None for word in (f"--{name}", str(value))]
        environment = report.environment(rank, size)
        return subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, process: Any, timeout_s: float = 900) -> dict[str, Any]:
        """Wait for a process and return what it printed."""
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"no end within {timeout_s:.0f} s"}
        if process.returncode:
            return {"error": (err.strip().splitlines() or ["?"])[-1][:300]}
        lines = [line for line in out.splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}

    def epoch(self, reader: str, kind: str, workers: int) -> dict[str, Any]:
        """Read one epoch; the limit with workers is that of as many processes at once."""
        if reader == "limit" and workers:
            running = [self.start(reader, kind, "epoch", rank=r, size=workers, rows=self.rows // workers) for r in range(workers)]
            runs = [self.finish(process) for process in running]
            return runs[0] | {"samples_per_s": sum(r["samples_per_s"] for r in runs), "cpu_ms": statistics.mean(r["cpu_ms"] for r in runs)}
        return self.finish(self.start(reader, kind, "epoch", workers=workers, rows=self.rows))

    def resume(self, reader: str, kind: str, workers: int, size: int, workers_after: int) -> dict[str, Any]:
        """Stop at nine tenths of an epoch and go on in other processes; count what came twice and what never came."""
        stop = round(RESUME_AT * self.rows)
        with tempfile.TemporaryDirectory() as place:
            saved = Path(place) / "state"
            before = self.finish(self.start(reader, kind, "part", workers=workers, stop=stop, save=saved))
            if "error" in before:
                return before
            share = -(-(self.rows - len(before["keys"])) // size)  # some readers run on into the next epoch by themselves
            options = {"size": size, "workers": workers_after, "load": saved, "stop": share}
            ranks = [self.start(reader, kind, "part", rank=r, **options) for r in range(size if share > 0 else 0)]
            after = [self.finish(process) for process in ranks]
        errors = [run["error"] for run in after if "error" in run]
        if errors:
            return {"refused": errors[0]}
        seen = Counter(before["keys"]) + Counter(key for run in after for key in run["keys"])
        times = [run["first_batch_s"] for run in after if run["first_batch_s"] is not None]
        return {
            "first_batch_s": max(times, default=None),
            "repeated": sum(count - 1 for count in seen.values()),
            "lost": self.rows - len(seen),
        }

    def spread(self, reader: str, kind: str) -> dict[str, Any]:
        """Read an epoch's keys: source shards among the first samples, and a sum of all pixels that every reader must share."""
        found = self.finish(self.start(reader, kind, "part", workers=2))
        if "error" in found:
            return found
        sources = [key.partition("-")[0] for key in found["keys"]]
        return {
            "shards_in_64": len(set(sources[:64])),
            "shards_in_1000": len(set(sources[:1000])),
            "samples": len(sources),
            "pixels": found["pixels"],
        }


def compare(bench: Bench, kind: str, readers: list[str], rounds: int) -> list[dict[str, Any]]:
    """Measure every reader over one data set."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {(r, w): [] for r in ["limit", *readers] for w in WORKERS}
    for name, _ in runs:
        bench.folder(name, kind)
    for turn in range(rounds):
        for (reader, workers), found in runs.items():
            found.append(bench.epoch(reader, kind, workers))
            print(f"{kind} round {turn + 1} {reader} {workers}: {found[-1]}", flush=True)
    rows = [report.medians(reader, workers, found) for (reader, workers), found in runs.items()]
    for row in rows:
        if row["reader"] != "limit" and "error" not in row:
            workers = row["workers"]
            row["resume"] = bench.resume(row["reader"], kind, workers, 1, workers)
            if workers:
                row["spread"] = bench.spread(row["reader"], kind)
                row["resume_other"] = bench.resume(row["reader"], kind, workers, *OTHER)
            print(f"{kind} {row}", flush=True)
    return report.ranked(rows)


def main() -> None:
    """Write the images, measure, write JSON, a table and a chart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "read.json")
    parser.add_argument("--venvs", type=Path, required=True, help="folder of the readers' environments; made where absent")
    parser.add_argument("--data", type=Path, help="keep the data sets here instead of a temporary folder")
    parser.add_argument("--readers", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1000)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (words.data or Path(temporary)).resolve()
        bench = Bench(place, words.venvs.resolve(), words.shards * words.rows)
        results = {}
        for kind in words.sets:
            write_images(place / kind / "tars", words.shards, words.rows, *SETS[kind])
            results[kind] = compare(bench, kind, words.readers, words.rounds)
        versions = {reader: PEERS[reader] for reader in words.readers if reader in PEERS}
        report.write(words.out, results, versions | {"torch": TORCH}, rows=words.shards * words.rows, rounds=words.rounds)


if __name__ == "__main__":
    main()
