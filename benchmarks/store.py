"""A run through an object store that fails 5 % of requests, stalls 1 % and truncates 1 %, against the same store without faults.

Both stand behind a proxy on loopback, in processes of their own; they are read in turn, by byte range and through a fresh cache. Every
pass compares each sample with the local folder's.

    python benchmarks/store.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shards.index import adopt
from shards.order import GlobalOrder
from shards.read import ShardReader
from shards.sample import Sample
from shards.store.config import StoreConfig
from tests.shards.bucket import ENVIRONMENT, s3_server, upload
from tests.shards.faulty_proxy import Faults, FaultyProxy
from tests.shards.tars import jpeg, write_tar

FAULTS = {"fail": 0.05, "stall": 0.01, "truncate": 0.01}
SIDE = 256


def write_images(folder: Path, shards: int, rows: int) -> None:
    """Write JPEG of SIDE x SIDE."""
    for shard in range(shards):
        samples = [Sample(f"k{shard:03d}{row:05d}", {"jpg": jpeg(shard * rows + row, SIDE, SIDE)}) for row in range(rows)]
        write_tar(folder / f"s-{shard:03d}.tar", samples)
    adopt(folder)


def serve(folder: Path, seed: int, pipe: Connection) -> None:
    """Serve a data set with and without faults until the other end hangs up; say what the faults were."""
    with s3_server() as port, FaultyProxy(port) as clean, FaultyProxy(port, Faults(seed=seed, **FAULTS)) as faulty:
        upload(folder, port, "images")
        pipe.send((clean.url, faulty.url))
        pipe.recv()
        pipe.send(dict(Counter(str(p.fault) for p in faulty.passed)))


def one_pass(endpoint: str, local: ShardReader, threads: int, store: StoreConfig, seed: int) -> dict[str, Any]:
    """Read one epoch in a shuffled order and compare every sample."""
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    _, shards, rows = GlobalOrder(local.rows_per_shard, seed).locate(np.arange(len(local)))
    places = list(zip(shards.tolist(), rows.tolist(), strict=True))
    begin = time.perf_counter()
    reader = ShardReader("s3://images", store=store)
    with ThreadPoolExecutor(threads) as pool:
        samples = list(pool.map(reader.__getitem__, places))
    seconds = time.perf_counter() - begin
    wrong = sum(sample != local[place] for place, sample in zip(places, samples, strict=True))
    return {"samples_per_s": len(samples) / seconds, "wrong": wrong, "repeated": len(samples) - len({s.key for s in samples})} | asdict(
        reader.statistics()
    )


def compare(mode: str, urls: tuple[str, str], local: ShardReader, words: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Read without and with faults in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"clean": [], "faulty": []}
    for turn in range(words.pairs):
        for name, url in zip(runs, urls, strict=True):
            cache = scratch / "cache"
            store = StoreConfig(cache=str(cache) if mode == "cache" else None, chunk_bytes=words.chunk_bytes)
            runs[name].append(one_pass(url, local, words.threads, store, seed=turn))
            shutil.rmtree(cache, ignore_errors=True)
    ratios = [b["samples_per_s"] / a["samples_per_s"] for a, b in zip(runs["clean"], runs["faulty"], strict=True)]
    return {
        "mode": mode,
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "samples_per_s": {name: statistics.median(run["samples_per_s"] for run in found) for name, found in runs.items()},
        "wrong_or_repeated": sum(run["wrong"] + run["repeated"] for found in runs.values() for run in found),
        "last_runs": {name: found[-1] for name, found in runs.items()},
    }


def main() -> None:
    """Write shards, serve them, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--chunk-bytes", type=int, default=2**20, help="smaller than the default: the shards here are")
    words = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        write_images(folder, words.shards, words.rows)
        ours, theirs = mp.get_context("spawn").Pipe()
        server = mp.get_context("spawn").Process(target=serve, args=(folder, 0, theirs), daemon=True)
        server.start()
        urls = ours.recv()
        results = [compare(mode, urls, ShardReader(folder), words, Path(place)) for mode in ("range", "cache")]
        ours.send(None)
        faults = ours.recv()
        server.join()
    report = {
        "benchmark": "store",
        "what": f"{words.shards} shards of {words.rows} JPEG {SIDE} x {SIDE}, {words.threads} threads, every sample compared",
        "faults": FAULTS,
        "ratio": "samples a second through the faulty store over the fault-free one, median of the pairs",
        "results": results,
        "requests_to_the_faulty_store": faults,
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "obstore", "moto")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
