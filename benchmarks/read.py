"""Samples a second of our step loader against webdataset's, with the same decoder, batch and number of workers.

    python benchmarks/read.py [--out benchmarks/results/read.json] [--workers 0 2] [--pairs 5]

Both deliver uint8 batches of decoded 256 x 256 JPEGs with their keys, shuffled: ours by the exact global order, webdataset's by its
shards and a buffer. Runs alternate A B A B, so that a change of the machine's load hits both; medians and the median of the pairs'
ratios are kept. CPU time is that of the process and of all it started.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from PIL import Image

from mmscale.config import DataConfig, ModelConfig, ObjectiveConfig, ObjectivesConfig, RunConfig
from mmscale.data.collate import Collator
from mmscale.data.dataset import ShardDataset
from mmscale.data.loader import StepLoader
from mmscale.data.tokenize import TextTokenizer
from shards.index import adopt

SIDE = 256
BATCH = 64
SHUFFLE_BUFFER = 1000


def write_images(folder: Path, shards: int, rows: int) -> None:
    """Write shards of JPEGs of about 30 KB: smooth colour and noise."""
    generator = np.random.default_rng(0)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for row in range(rows):
                smooth = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(
                    (SIDE, SIDE), Image.Resampling.BICUBIC
                )
                noisy = np.asarray(smooth) + generator.normal(0, 12, (SIDE, SIDE, 3))
                stream = io.BytesIO()
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
                tar.write({"__key__": f"{shard:05d}-{row:05d}", "jpg": stream.getvalue(), "txt": "a picture"})
    adopt(folder)


def write_tokenizer(folder: Path) -> TextTokenizer:
    """Write the smallest tokenizer there is; no text is read here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1}, unk_token="[SEP]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]").save_pretrained(str(folder))
    return TextTokenizer(folder)


def open_ours(folder: Path, tokenizer: TextTokenizer, samples: int, workers: int) -> StepLoader:
    """Build our loader: images only."""
    config = RunConfig(
        run="",
        data=DataConfig(shards=str(folder), caption=None, text=None),
        model=ModelConfig(image_size=SIDE, patch_size=16),
        objectives=ObjectivesConfig(contrastive=ObjectiveConfig(weight=1.0)),
    )
    return StepLoader(
        ShardDataset(folder, image_size=SIDE),
        Collator.from_config(config, tokenizer),
        global_batch=BATCH,
        micro_batch=BATCH,
        rank=0,
        size=1,
        steps=samples // BATCH,
        workers=workers,
        threads=1,
    )


def decode_sample(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Decode one sample of webdataset, by the decoder that ours uses."""
    return sample["__key__"], simplejpeg.decode_jpeg(sample["jpg"], "RGB")


def stack(samples: list[tuple[str, np.ndarray]]) -> tuple[list[str], torch.Tensor]:
    """Stack decoded samples."""
    return [key for key, _ in samples], torch.from_numpy(np.stack([image for _, image in samples]))


def open_webdataset(folder: Path, workers: int) -> Any:
    """Build webdataset's pipeline as its manual has it: batches made in the workers."""
    urls = sorted(str(p) for p in folder.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(SHUFFLE_BUFFER)
        .map(decode_sample)
        .batched(BATCH, partial=False, collation_fn=stack)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def read_ours(folder: Path, tokenizer: TextTokenizer, samples: int, workers: int) -> Iterator[int]:
    """Yield the size of each batch."""
    with open_ours(folder, tokenizer, samples, workers) as loader:
        for step in loader:
            yield len(step.micro[0].pixels_NCHW)


def read_webdataset(folder: Path, workers: int) -> Iterator[int]:
    """Yield the size of each batch."""
    for _, pixels in open_webdataset(folder, workers):
        yield len(pixels)


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


def measure(batches: Callable[[], Iterator[int]]) -> dict[str, float]:
    """Read one epoch. Start-up counts in cpu_ms and first_batch_s; the rate is that after the first batch."""
    gc.collect()
    cpu, begin = cpu_seconds(), time.perf_counter()
    running = batches()
    first = next(running)
    started = time.perf_counter()
    samples, spent = 0, cpu
    for size in running:
        samples += size
        spent = cpu_seconds() if samples % (BATCH * 16) == 0 else spent  # before a worker's last batch: then it may be gone
    return {
        "samples_per_s": samples / (time.perf_counter() - started),
        "cpu_ms_per_sample": 1000 * (max(spent, cpu_seconds()) - cpu) / (samples + first),
        "first_batch_s": started - begin,
    }


def compare(folder: Path, tokenizer: TextTokenizer, samples: int, workers: int, pairs: int) -> dict[str, Any]:
    """Measure both in turn, after a warm-up of each."""
    ours = lambda: read_ours(folder, tokenizer, samples, workers)  # noqa: E731
    theirs = lambda: read_webdataset(folder, workers)  # noqa: E731
    measure(ours), measure(theirs)
    runs = [(measure(ours), measure(theirs)) for _ in range(pairs)]
    names = ("samples_per_s", "cpu_ms_per_sample", "first_batch_s")
    median = [{n: statistics.median(run[i][n] for run in runs) for n in names} for i in (0, 1)]
    ratios = [a["samples_per_s"] / b["samples_per_s"] for a, b in runs]
    cpu_ratios = [b["cpu_ms_per_sample"] / a["cpu_ms_per_sample"] for a, b in runs]
    return {
        "workers": workers,
        "mmscale": median[0],
        "webdataset": median[1],
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
    }


def main() -> None:
    """Write shards, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "read.json")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=512)
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        write_images(folder, words.shards, words.rows)
        tokenizer = write_tokenizer(Path(place) / "tokenizer")
        results = [compare(folder, tokenizer, words.shards * words.rows, w, words.pairs) for w in words.workers]
    report = {
        "benchmark": "read",
        "what": f"JPEG {SIDE} x {SIDE}, quality 90, batch {BATCH}, shuffled, 1 decode thread a worker",
        "ratio": "samples a second of ours over webdataset's, median of the pairs; cpu_ratio: CPU time a sample of webdataset's over ours",
        "results": results,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {n: version(n) for n in ("mmscale", "torch", "webdataset", "simplejpeg", "numpy")}
        | {"python": platform.python_version()},
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
