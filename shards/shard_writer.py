"""Write one shard: load, clean, tar, index; committed as a whole or not at all."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c

from shards.clean import CleanSample, LeftOut, clean_sample
from shards.commit import commit_bytes, commit_file, gathering
from shards.config import WriteConfig
from shards.errors import SampleError, ShardError
from shards.filter import FilterConfig, Judge
from shards.index import shard_info
from shards.manifest import sidecar_path
from shards.plan import ShardTask, shard_name
from shards.sample import Sample, validate
from shards.sidecar import IndexEntry, PartEntry, read_index, write_index
from shards.sources import make_source
from shards.sources.record import RawSample, Record, Source
from shards.tar import TarStream

QUARANTINE_FOLDER = "quarantine"
FILTERED_FOLDER = "filtered"
REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of one shard's records."""

    number: int
    rows: int
    quarantined: Mapping[str, int]
    """Refused samples by reason."""
    filtered: Mapping[str, int]
    """Samples that the filter has left out, by reason."""


class ShardWriter:
    """Writes shards of one configuration, one after another."""

    def __init__(self, config: WriteConfig) -> None:
        self._config = config
        self._out = Path(config.out)

    @cached_property
    def _source(self) -> Source:
        return make_source(self._config)

    @cached_property
    def _judge(self) -> Judge | None:
        return None if self._config.filter == FilterConfig() else Judge(self._config.filter)

    def __reduce__(self) -> tuple[type[ShardWriter], tuple[WriteConfig]]:
        """Pickle the configuration: each process opens the source by itself, at its first shard."""
        return ShardWriter, (self._config,)

    def __call__(self, task: ShardTask, report: Callable[[int], None]) -> ShardResult:
        """Write and commit a shard.

        Args:
            task: the shard.
            report: called now and then with the samples done since the last call.

        Raises:
            ShardError: the disk refused.
            SourceError: the source cannot be read any more.
        """
        tar = self._out / task.name
        try:
            with gathering(tar) as written:
                return self._write(task, tar, written, report)
        except FileNotFoundError as e:
            raise ShardError(
                f"A temporary file of the shard {task.name!r} vanished from {str(self._out)!r} while it was written: somebody has cleaned "
                "the folder, or completed the data set without this command. Repeat the command; finished shards are kept."
            ) from e
        except OSError as e:
            raise ShardError(
                f"Writing the shard {task.name!r} in {str(self._out)!r} failed: {e.strerror or e}. Mend that and repeat the command; "
                "finished shards are kept."
            ) from e

    def _write(self, task: ShardTask, tar: Path, written: Path, report: Callable[[int], None]) -> ShardResult:
        entries: list[IndexEntry] = []
        faults: list[dict[str, str]] = []
        filtered: list[dict[str, str]] = []
        progress = _Progress(report)
        with written.open("wb") as file:
            stream = TarStream(file)
            for record in task.records:
                try:
                    sample = self._sample(record)
                    if isinstance(sample, LeftOut):
                        filtered.append({"key": sample.key, "reason": sample.reason, "source": record.where})
                    else:
                        entries.append(_add(stream, sample))
                except SampleError as e:
                    faults.append({"key": e.key, "reason": e.reason, "detail": e.detail, "source": record.where})
                progress.step()
            sha256 = stream.close()
        commit_file(written, tar)
        _commit_lines(quarantine_path(self._out, task.name), faults)
        _commit_lines(filtered_path(self._out, task.name), filtered)
        write_index(sidecar_path(tar), entries, tar_sha256=sha256)
        progress.flush()
        return ShardResult(task.number, len(entries), count_reasons(faults), count_reasons(filtered))

    def _sample(self, record: Record) -> CleanSample | LeftOut:
        if record.problem is not None:
            raise SampleError(record.key, *record.problem)
        raw: RawSample = self._source.load(record)
        clean = clean_sample(record, raw, self._config, self._judge)
        if isinstance(clean, CleanSample):
            validate(Sample(clean.key, clean.parts))
        return clean


def finished_shard(out: Path, number: int) -> ShardResult | None:
    """What an earlier or another command has committed of a shard, or None if it is still to be written."""
    name = shard_name(number)
    tar = out / name
    if not tar.exists() or not sidecar_path(tar).exists():
        return None
    try:
        shard_info(tar)
        rows = read_index(sidecar_path(tar)).num_rows
    except ShardError:
        return None
    refused, filtered = (count_reasons(read_lines(path)) for path in (quarantine_path(out, name), filtered_path(out, name)))
    return ShardResult(number, rows, refused, filtered)


def quarantine_path(out: Path, name: str) -> Path:
    """Where the refused samples of one shard are named."""
    return out / QUARANTINE_FOLDER / f"{Path(name).stem}.jsonl"


def filtered_path(out: Path, name: str) -> Path:
    """Where the samples of one shard that the filter has left out are named."""
    return out / FILTERED_FOLDER / f"{Path(name).stem}.jsonl"


def read_lines(path: Path) -> list[dict[str, str]]:
    """Read the lines of a quarantine file; none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def count_reasons(lines: Iterable[Mapping[str, str]]) -> Counter[str]:
    """Count lines by their reason."""
    return Counter(line["reason"] for line in lines)


def _commit_lines(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    if not lines:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    commit_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode("ascii"))


def _add(stream: TarStream, sample: CleanSample) -> IndexEntry:
    parts = []
    for extension in sorted(sample.parts):
        data = sample.parts[extension]
        offset = stream.add(f"{sample.key}.{extension}", data)
        parts.append(PartEntry(extension, offset, len(data), google_crc32c.value(data)))
    media = sample.media
    return IndexEntry(
        sample.key, parts, sample.width, sample.height, sample.caption_length, media.duration_s, media.sample_rate, media.frames
    )


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
