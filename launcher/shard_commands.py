"""`mmscale shards ...`: the calls into the ground floor, and what is printed about them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shards import configfile, img2dataset
from shards.config import WriteConfig
from shards.energon import write_energon
from shards.index import adopt
from shards.verify import verify
from shards.write import write_shards


def write_data_set(path: Path | None, words: Sequence[str]) -> None:
    """Write the data set of a configuration file and `key=value` words, and print the summary."""
    print(write_shards(configfile.load(WriteConfig, path, words)))


def index_tars(folder: Path, energon: bool) -> None:
    """Index every tar that is not, write the manifest, for Energon too if asked for, and print what the data set holds."""
    manifest = adopt(folder, progress=_show_progress)
    if img2dataset.is_output(folder):
        print(img2dataset.downloads([folder / info.shard for info in manifest.shards]))
    if energon:
        write_energon(manifest, progress=_show_progress)
    print(f"{manifest.rows} samples in {len(manifest.shards)} shards, {manifest.bytes / 2**20:,.1f} MiB, version {manifest.digest[:12]}")


def verify_data_set(folder: Path, sample: int | None, full: bool) -> int:
    """Check a data set and print every fault.

    Returns:
        1 when there is a fault, else 0.
    """
    report = verify(folder, sample=sample, full=full, progress=_show_progress)
    for fault in report.faults:
        print(fault)
    found = f"{len(report.faults)} faults" if report.faults else "no fault"
    print(f"{found} in {report.shards} shards of {report.rows} samples; {report.checked} samples read, compared and decoded")
    return 0 if report.sound else 1


def show_data_set(folder: Path, key: str | None, out: Path | None) -> None:
    """Print what a data set holds and draw it, or the same for one sample."""
    from shards import report  # matplotlib: a second that only this command needs

    if key is not None:
        print(report.show_sample(folder, key, out or Path(f"{key.replace('/', '-')}.png")))
        return
    picture = out or Path(f"{folder.resolve().name}.png")
    print(report.summary(folder))
    report.render(folder, picture)
    print(f"  histograms and a contact sheet are in {picture}")


def _show_progress(done: int, total: int, name: str = "") -> None:
    """Keep one line up to date on a terminal; elsewhere say nothing."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} shards {name}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
