"""Write one shard: load, clean, tar, index; committed as a whole or not at all."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from shards.clean import CleanSample, clean_sample
from shards.commit import commit_bytes, commit_file, temporary
from shards.config import WriteConfig
from shards.errors import SampleError, ShardError
from shards.index import IndexEntry, PartEntry, read_index, shard_info, write_index
from shards.manifest import sidecar_path
from shards.plan import ShardTask
from shards.sample import Sample, validate
from shards.sources import make_source
from shards.sources.record import RawSample, Record
from shards.tar import TarStream

QUARANTINE_FOLDER = "quarantine"
REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of one shard's records."""

    name: str
    rows: int
    quarantined: Mapping[str, int]
    """Refused samples by reason."""


class ShardWriter:
    """Writes shards of one configuration, one after another."""

    def __init__(self, config: WriteConfig) -> None:
        self._config = config
        self._source = make_source(config)
        self._out = Path(config.out)

    def write(self, task: ShardTask, report: Callable[[int], None]) -> ShardResult:
        """Write and commit a shard.

        Args:
            task: the shard.
            report: called now and then with the samples done since the last call.

        Raises:
            ShardError: the disk refused.
            SourceError: the source cannot be read any more.
        """
        try:
            return self._write(task, report)
        except OSError as e:
            raise ShardError(
                f"Writing the shard {task.name!r} in {str(self._out)!r} failed: {e.strerror or e}. Mend that and repeat the command; "
                "finished shards are kept."
            ) from e

    def _write(self, task: ShardTask, report: Callable[[int], None]) -> ShardResult:
        tar = self._out / task.name
        entries: list[IndexEntry] = []
        faults: list[tuple[Record, SampleError]] = []
        progress = _Progress(report)
        with temporary(tar).open("wb") as file:
            stream = TarStream(file)
            for record in task.records:
                try:
                    entries.append(_add(stream, self._sample(record)))
                except SampleError as e:
                    faults.append((record, e))
                progress.step()
            sha256 = stream.close()
        commit_file(temporary(tar), tar)
        _commit_quarantine(self._out, task, faults)
        write_index(sidecar_path(tar), entries, tar_sha256=sha256)
        progress.flush()
        return ShardResult(task.name, len(entries), Counter(fault.reason for _, fault in faults))

    def _sample(self, record: Record) -> CleanSample:
        if record.problem is not None:
            raise SampleError(record.key, *record.problem)
        raw: RawSample = self._source.load(record)
        clean = clean_sample(record, raw, self._config)
        validate(Sample(clean.key, clean.parts))
        return clean


def finished_shard(out: Path, task: ShardTask) -> ShardResult | None:
    """What an earlier command has committed of this shard, or None if it is still to be written."""
    tar = out / task.name
    if not tar.exists() or not sidecar_path(tar).exists():
        return None
    try:
        shard_info(tar)
        rows = read_index(sidecar_path(tar)).num_rows
    except ShardError:
        return None
    lines = read_quarantine(quarantine_path(out, task))
    return ShardResult(task.name, rows, Counter(line["reason"] for line in lines))


def quarantine_path(out: Path, task: ShardTask) -> Path:
    """Where the refused samples of one shard are named."""
    return out / QUARANTINE_FOLDER / f"{Path(task.name).stem}.jsonl"


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """Read the lines of a quarantine file; none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _commit_quarantine(out: Path, task: ShardTask, faults: list[tuple[Record, SampleError]]) -> None:
    path = quarantine_path(out, task)
    if not faults:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    lines = [{"key": fault.key, "reason": fault.reason, "detail": fault.detail, "source": record.where} for record, fault in faults]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    commit_bytes(path, text.encode("ascii"))


def _add(stream: TarStream, sample: CleanSample) -> IndexEntry:
    parts = []
    for extension in sorted(sample.parts):
        data = sample.parts[extension]
        offset = stream.add(f"{sample.key}.{extension}", data)
        parts.append(PartEntry(extension, offset, len(data), google_crc32c.value(data)))
    return IndexEntry(sample.key, parts, sample.width, sample.height, sample.caption_length)


class _Progress:
    """Counts samples and reports them at a bounded rate."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._count = 0
        self._last = time.monotonic()

    def step(self) -> None:
        self._count += 1
        if time.monotonic() - self._last > REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._count:
            self._report(self._count)
        self._count = 0
        self._last = time.monotonic()
