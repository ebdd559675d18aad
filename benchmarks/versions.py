"""What versions of data sets cost, and how well near duplicates are told from other pictures.

    python benchmarks/versions.py [--pictures FOLDER ...] [--shards 1000000] [--hashes 1000000] [--out benchmarks/results/versions.json]

Manifest: seconds of CPU time and MB to read one of so many shards, to get one shard of it, to list them all. Search: CPU seconds to find
all pairs among random structures, a tenth of which are near another. Pictures: each of the folders' pictures is changed in several ways
and sought among the originals; for each distance, the fraction that is found, and how many pairs of originals would be called the same,
by the structure alone and with the thumbnails as it is done. Look: pictures a second of one core, of 640 x 480 JPEG.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

from shards.manifest import ShardInfo, read_manifest, write_manifest
from shards.perceptual import THUMBNAIL_BYTES, Look, look_of, thumbnails_differ
from shards.report import picture_of
from shards.sample import Sample
from shards.versions.near import Features, find_duplicates

DISTANCES = (0, 1, 2, 3, 4, 6, 8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cropped(image: Image.Image, fraction: float) -> Image.Image:
    """Cut so much of each side away."""
    x, y = image.width * fraction, image.height * fraction
    return image.crop((round(x), round(y), round(image.width - x), round(image.height - y)))


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG quality 50": lambda image: encoded(image, "JPEG", quality=50),
    "JPEG quality 20": lambda image: encoded(image, "JPEG", quality=20),
    "half the size": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "three times the size": lambda image: encoded(image.resize((image.width * 3, image.height * 3), Image.Resampling.BICUBIC)),
    "half the size, JPEG quality 70": lambda image: encoded(image.resize((image.width // 2, image.height // 2)), "JPEG", quality=70),
    "height x 0.8": lambda image: encoded(image.resize((image.width, round(image.height * 0.8)))),
    "1.5 % off each side": lambda image: encoded(cropped(image, 0.015)),
    "3 % off each side": lambda image: encoded(cropped(image, 0.03)),
}


def measure_manifest(shards: int) -> dict[str, float]:
    """Write, read and list a manifest of so many shards."""
    generator = np.random.default_rng(0)
    digests = [generator.bytes(32).hex() for _ in range(shards)]
    statistics = {"width_min": 200, "width_mean": 256.5, "width_max": 1024, "height_min": 200, "height_mean": 256.25, "height_max": 1024}
    infos = [
        ShardInfo(shard=f"shard-{number:07d}.tar", rows=10_000, bytes=3 << 28, sha256=digest, index_sha256=digest, **statistics)
        for number, digest in enumerate(digests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), infos)
        del infos, digests
        before, started = psutil.Process().memory_info().rss, time.process_time()
        manifest = read_manifest(folder, check_files=False)
        read_s = time.process_time() - started
        size = (Path(folder) / "manifest.parquet").stat().st_size
    started = time.process_time()
    manifest.shards[shards // 2]
    one_s = time.process_time() - started
    started = time.process_time()
    for _ in manifest.shards:
        continue
    listed_s = time.process_time() - started
    return {
        "shards": shards,
        "read_s": read_s,
        "one_s": one_s,
        "list_s": listed_s,
        "table_mb": manifest.table.nbytes / 1e6,
        "file_mb": size / 1e6,
        "resident_mb": (psutil.Process().memory_info().rss - before) / 1e6,
    }


def measure_search(count: int) -> dict[str, float]:
    """Find the near duplicates among so many structures."""
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**64, count, dtype=np.uint64)
    copies = count // 10
    words[-copies:] = words[:copies] ^ (np.uint64(1) << generator.integers(0, 64, copies, dtype=np.uint64))
    features = Features(
        exact_n2=generator.integers(0, 2**64, (count, 2), dtype=np.uint64),
        has_picture_n=np.ones(count, dtype=np.bool_),
        structure_n=words,
        thumbnail_n=pa.chunked_array([pa.array([bytes(THUMBNAIL_BYTES)] * count, pa.binary(THUMBNAIL_BYTES))]),
        thumbnail_digest_n=np.zeros(count, dtype=np.uint64),
        has_look_n=np.ones(count, dtype=np.bool_),
        label_n=np.zeros(count, dtype=np.uint64),
    )
    seconds: dict[str, float] = {"samples": count}
    for bits in (0, 3, 6):
        started = time.process_time()
        of_n, _ = find_duplicates(features, bits, 0)
        seconds[f"near_{bits}_s"] = time.process_time() - started
        seconds[f"near_{bits}_found"] = int((of_n >= 0).sum())
    return seconds


def compared(one: list[Look], other: list[Look]) -> tuple[Any, Any]:
    """Return bits that differ and whether the thumbnails do, pair by pair."""
    bits = np.bitwise_count(np.array([look.structure for look in one], np.uint64) ^ np.array([look.structure for look in other], np.uint64))
    thumbnails = [
        np.frombuffer(b"".join(look.thumbnail for look in looks), np.uint8).reshape(-1, THUMBNAIL_BYTES) for looks in (one, other)
    ]
    return bits, thumbnails_differ(*thumbnails)


def measure_pictures(folder: Path, most: int) -> dict[str, Any]:
    """Change the pictures of a folder, and compare them with their originals and the originals with each other."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))[:most]
    pictures = [image for path in paths if (image := picture_of(Sample(path.stem, {path.suffix[1:].lower(): path.read_bytes()})))]
    looks = [(look, image) for image in pictures if (look := look_of(encoded(image)))]
    found: dict[str, Any] = {}
    for name, change in CHANGES.items():
        changed = [(look, other) for look, image in looks if (other := look_of(change(image)))]
        bits, differ = compared([one for one, _ in changed], [other for _, other in changed])
        found[name] = {str(most_bits): float(((bits <= most_bits) & ~differ).sum() / len(looks)) for most_bits in DISTANCES}
    originals = [look for look, _ in looks]
    one, other = (indices.tolist() for indices in np.triu_indices(len(originals), 1))
    close = {"structure alone": dict.fromkeys(DISTANCES, 0), "with thumbnails": dict.fromkeys(DISTANCES, 0)}
    for start in range(0, len(one), 100_000):
        part = slice(start, start + 100_000)
        bits, differ = compared([originals[i] for i in one[part]], [originals[j] for j in other[part]])
        for most_bits in DISTANCES:
            close["structure alone"][most_bits] += int((bits <= most_bits).sum())
            close["with thumbnails"][most_bits] += int(((bits <= most_bits) & ~differ).sum())
    return {"pictures": len(looks), "pairs": len(one), "found": found, "pairs_called_the_same": close}


def measure_look(count: int = 60) -> float:
    """Return pictures a second."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC), "JPEG", quality=90)
    started = time.process_time()
    for _ in range(count):
        look_of(data)
    return count / (time.process_time() - started)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, nargs="*", default=[])
    parser.add_argument("--most-pictures", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": psutil.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "pillow")},
        "manifest": measure_manifest(arguments.shards),
        "search": measure_search(arguments.hashes),
        "looks_per_s": measure_look(),
        "pictures": {folder.name: measure_pictures(folder, arguments.most_pictures) for folder in arguments.pictures},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
