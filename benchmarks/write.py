"""Photos a second of `shards write` against the decode -> resize -> encode limit of the same cores, and against img2dataset.

    python -m venv PEER && PEER/bin/pip install img2dataset==1.47.0
    python benchmarks/write.py [--img2dataset PEER/bin/python] [--photos 4000] [--pairs 5] [--processes 2]

Photos of 640 x 480 (JPEG, quality 90) become photos of short side 256 (quality 90) in shards with index, checksums and manifest.

The photos are drawn: a 1/f spectrum of light and of two colours, as natural images have it, with shadowed discs for edges. At quality 90
they take about 120 KB each, as detailed photos of this size do. 100 are drawn; the others are their mirrored and shifted copies.

The limit is a loop over the same files, held in memory, in as many processes, which calls the same decoder, resizer and encoder and drops
the result. Two times are kept of it: `running`, of the loop alone, and `started`, with the start of the processes and their imports, as
the writer's time has it. The loop has the allocator's settings that the writer gives its processes, which makes it faster too.

img2dataset reads the same files by file:// URLs, resizes by its default filter (area) and encodes at the same quality; of several numbers
of threads the fastest is taken. Its time is that of its call, without the imports of the calling process, as ours is.

Runs alternate; medians, and the median of the ratios of each round, are kept.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shards.pool import worker_environment

WIDTH, HEIGHT, SIDE, QUALITY = 640, 480, 256, 90
DRAWN = 100
THREADS = (4, 16, 64)

IMG2DATASET = """
import sys, time, json, warnings, logging
warnings.simplefilter("ignore")
from img2dataset import download
if __name__ == "__main__":
    table, out, processes, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    started = time.perf_counter()
    download(url_list=table, input_format="parquet", url_col="url", caption_col="caption", output_folder=out, output_format="webdataset",
             image_size=256, resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=90, encode_format="jpg",
             processes_count=processes, thread_count=threads, number_sample_per_shard=1000, enable_wandb=False)
    print("SECONDS", time.perf_counter() - started)
"""


def draw_photo(seed: int) -> np.ndarray:
    """Draw one photo: (HEIGHT, WIDTH, 3) uint8."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1

    def field(power: float) -> np.ndarray:
        spectrum = (generator.normal(size=frequency.shape) + 1j * generator.normal(size=frequency.shape)) / frequency**power
        values = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
        return (values - values.mean()) / values.std()

    light, warm, green = field(1.2), field(1.6), field(1.6)
    photo = np.stack([128 + 45 * light + 20 * warm, 128 + 45 * light - 5 * warm - 8 * green, 128 + 45 * light + 20 * green], axis=-1)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(8):
        x, y, radius = generator.uniform(0, WIDTH), generator.uniform(0, HEIGHT), generator.uniform(20, 120)
        inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        photo[inside] = photo[inside] * 0.4 + generator.uniform(0, 255, 3) * 0.6
    return photo.clip(0, 255).astype(np.uint8)


def write_photos(folder: Path, count: int) -> int:
    """Write photos with captions and the table that img2dataset reads; returns the bytes of all photos."""
    images = folder / "images"
    images.mkdir()
    drawn = [draw_photo(seed) for seed in range(min(DRAWN, count))]
    total = 0
    for number in range(count):
        photo = np.roll(drawn[number % DRAWN], 16 * (number // (2 * DRAWN)), axis=1)
        photo = photo[:, ::-1] if number // DRAWN % 2 else photo
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "JPEG", quality=QUALITY)
        (images / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
        (images / f"{number:06d}.txt").write_text(f"photo number {number}")
        total += len(buffer.getvalue())
    urls = [f"file://{path}" for path in sorted(images.glob("*.jpg"))]
    pq.write_table(pa.table({"url": urls, "caption": [f"photo number {n}" for n in range(count)]}), folder / "table.parquet")
    return total


def write_ours(images: Path, out: Path, processes: int) -> float:
    """Write with ours, in a process of its own; returns the seconds of the call."""
    program = (
        "import sys, time; from shards import configfile; from shards.config import WriteConfig; from shards.write import write_shards;"
        "config = configfile.load(WriteConfig, None, sys.argv[1:]); started = time.perf_counter(); write_shards(config, progress=False);"
        "print('SECONDS', time.perf_counter() - started)"
    )
    words = ["source=folder", f"path={images}", f"out={out}", f"image.short_side={SIDE}", f"image.quality={QUALITY}"]
    return seconds_of([sys.executable, "-c", program, *words, f"processes={processes}", "part=all", "rows_per_shard=500"])


def seconds_of(command: list[str]) -> float:
    """Run a program that prints `SECONDS x`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    if done.returncode or not found:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return float(found[0])


def loop(images: Path, part: int, parts: int) -> None:
    """One process of the limit: print the seconds of reading and of the loop."""
    from shards import jpeg

    started = time.perf_counter()
    held = [path.read_bytes() for path in sorted(images.glob("*.jpg"))[part::parts]]
    read = time.perf_counter()
    width = round(WIDTH * SIDE / HEIGHT)
    for data in held:
        pixels = jpeg.decode(data, (WIDTH, HEIGHT), None)
        if pixels is None:
            raise SystemExit("a photo of the benchmark does not decode")
        jpeg.encode_resized(pixels, width, SIDE, quality=QUALITY, subsampling="420")
    print(json.dumps({"read_s": read - started, "loop_s": time.perf_counter() - read}))


def run_limit(images: Path, processes: int) -> dict[str, float]:
    """Run the limit; `started` is without the reading of the files into memory."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--loop", str(images), "--processes", str(processes), "--part"]
    environment = worker_environment()
    running = [subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, text=True, env=environment) for part in range(processes)]
    found = [json.loads(process.communicate()[0]) for process in running]
    wall = time.perf_counter() - begin
    return {"running": max(one["loop_s"] for one in found), "started": wall - max(one["read_s"] for one in found)}


def write_theirs(python: str, table: Path, out: Path, processes: int, threads: int) -> float:
    """Write with img2dataset; returns the seconds of the call."""
    script = out.parent / "peer.py"
    script.write_text(IMG2DATASET)
    return seconds_of([python, str(script), str(table), str(out), str(processes), str(threads)])


def measure(place: Path, words: argparse.Namespace) -> dict[str, Any]:
    """Run all in turn, after a warm-up of each."""
    images, count = place / "images", words.photos
    write_ours(images, place / "warm", words.processes)
    run_limit(images, words.processes)
    threads = None
    if words.img2dataset:
        tried = {n: write_theirs(words.img2dataset, place / "table.parquet", place / f"peer-{n}", words.processes, n) for n in THREADS}
        threads = min(tried, key=lambda n: tried[n])
    rounds = []
    for number in range(words.pairs):
        one = {"ours": write_ours(images, place / f"ours-{number}", words.processes)}
        one |= {f"limit_{name}": seconds for name, seconds in run_limit(images, words.processes).items()}
        if threads is not None:
            out = place / f"theirs-{number}"
            one["img2dataset"] = write_theirs(words.img2dataset, place / "table.parquet", out, words.processes, threads)
        rounds.append(one)
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    ratios = {f"share_of_{name}": [one[name] / one["ours"] for one in rounds] for name in ("limit_running", "limit_started")}
    if threads is not None:
        ratios["times_img2dataset"] = [one["img2dataset"] / one["ours"] for one in rounds]
    return {
        "photos_per_s": {name: count / seconds for name, seconds in median.items()},
        **{name: statistics.median(values) for name, values in ratios.items()},
        "rounds": rounds,
        "img2dataset_threads": threads,
    }


def main() -> None:
    """Write photos, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "write.json")
    parser.add_argument("--img2dataset", help="Python of an environment that holds img2dataset; without it the peer is left out.")
    parser.add_argument("--photos", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.loop is not None:
        loop(words.loop, words.part, words.processes)
        return
    with tempfile.TemporaryDirectory() as place:
        total = write_photos(Path(place), words.photos)
        results = measure(Path(place), words)
    report = {
        "benchmark": "write",
        "what": f"{words.photos} photos {WIDTH} x {HEIGHT} of {total / words.photos / 1000:.0f} KB -> short side {SIDE}, quality {QUALITY}",
        "ratios": "share_of_limit_*: the limit's time over ours; times_img2dataset: its time over ours; medians of the rounds",
        "processes": words.processes,
        **results,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "simplejpeg", "av", "pillow", "numpy")} | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def cpu_name() -> str:
    """Name of the processor, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
