"""`mmscale shards ...`: the calls into the ground floor, and what is printed about them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards import configfile, img2dataset
from shards.config import WriteConfig
from shards.energon import write_energon
from shards.index import adopt
from shards.repair import repair
from shards.verify import verify
from shards.versions.dedup import DedupConfig, dedup_data_set
from shards.versions.filter import FilterVersionConfig, filter_data_set
from shards.versions.merge import MergeConfig, merge_data_sets
from shards.versions.split import SplitConfig, split_data_set
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


def verify_data_set(folder: str, sample: int | None, full: bool) -> int:
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


def repair_data_set(folder: str | Path, copies: str | None) -> int:
    """Mend a data set and print every step.

    Returns:
        1 when something could not be mended, else 0.
    """
    report = repair(folder, copies=copies, progress=_show_progress)
    print(report)
    return 1 if report.failed else 0


def filter_version(folder: Path, path: Path | None, words: Sequence[str]) -> None:
    """Make a version without what the rules drop, and print how many each dropped."""
    print(filter_data_set(folder, configfile.load(FilterVersionConfig, path, _with_lists(FilterVersionConfig, words))))


def dedup_version(folder: Path, path: Path | None, words: Sequence[str]) -> None:
    """Make a version without duplicates, and print how many there were."""
    print(dedup_data_set(folder, configfile.load(DedupConfig, path, _with_lists(DedupConfig, words))))


def split_versions(folder: Path, path: Path | None, words: Sequence[str]) -> None:
    """Make a version a part, and print what each holds. A word with any other key than the settings' names a part."""
    settings = {field.name for field in dataclasses.fields(SplitConfig)}
    named = [word if word.partition("=")[0].split(".")[0] in settings else f"parts.{word}" for word in words]
    for part in split_data_set(folder, configfile.load(SplitConfig, path, named)):
        print(part)


def merge_versions(folders: Sequence[Path], words: Sequence[str]) -> None:
    """Make one data set of several, and print what it holds."""
    print(merge_data_sets(folders, configfile.load(MergeConfig, None, words)))


def show_data_set(folder: str, key: str | None, out: Path | None) -> None:
    """Print what a data set holds and draw it, or the same for one sample."""
    from shards import report  # matplotlib: a second that only this command needs

    if key is not None:
        print(report.show_sample(folder, key, out or Path(f"{key.replace('/', '-')}.png")))
        return
    picture = out or Path(f"{report.data_set_name(folder)}.png")
    print(report.summary(folder))
    report.render(folder, picture)
    print(f"  histograms and a contact sheet are in {picture}")


def _with_lists(cls: type[Any], words: Sequence[str]) -> list[str]:
    """Let a list of one be given without its brackets: `where=score>=0.5`."""
    lists = {field.name for field in dataclasses.fields(cls) if str(field.type).startswith("list")}
    split = [word.partition("=") for word in words]
    return [f"{key}=[{value}]" if key in lists and not value.startswith("[") else f"{key}{equals}{value}" for key, equals, value in split]


def _show_progress(done: int, total: int, name: str = "") -> None:
    """Keep one line up to date on a terminal; elsewhere say nothing."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} shards {name}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
