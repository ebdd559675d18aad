"""Tars that others wrote, in the WebDataset layout: consecutive members of one key are one sample."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from shards.config import WriteConfig
from shards.errors import SampleError, SourceError
from shards.sample import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, split_name
from shards.sources.folder import parse_fields, pop_captions
from shards.sources.paths import expand
from shards.sources.record import RawSample, Record, refuse_shared_keys, safe_key

Part = tuple[str, int, int]
"""(extension, offset in the tar, size in bytes)."""


class WebDatasetSource:
    """Samples of one or several uncompressed tars."""

    def __init__(self, config: WriteConfig) -> None:
        self._open: tuple[int, int] | None = None
        self._files = expand(config.path or "", (".tar",))
        shared = len({file.stem for file in self._files}) < len(self._files)
        self._prefixes = [f"{number:05d}-{file.stem}" if shared else file.stem for number, file in enumerate(self._files)]
        self._limits = {ext: (f"{kind}.max_bytes", most) for kind, (extensions, most) in _media(config).items() for ext in extensions}
        self._other = "image.max_bytes", config.image.max_bytes

    def records(self) -> list[Record]:
        """List the samples tar by tar, from the members' headers alone; a tar that is cut short ends with a refused record."""
        listed = [record for number, file in enumerate(self._files) for record in _scan(number, file, self._prefixes[number])]
        if all(record.problem and record.problem[0] == "broken_tar" for record in listed):
            cause = listed[0].problem[1] if listed and listed[0].problem else ""
            raise SourceError(f"The {len(self._files)} tars at {str(self._files[0].parent)!r} hold no sample. {cause} Give another `path`.")
        return refuse_shared_keys(self._distinct(listed))

    def load(self, record: Record) -> RawSample:
        """Read the parts of one sample."""
        file_number, parts = record.locator
        read = {extension: self._read(record.key, file_number, extension, (offset, size)) for extension, offset, size in parts}
        fields = parse_fields(record.key, read.pop("json")) if "json" in read else {}
        captions = [read.pop("txt")] if "txt" in read else pop_captions(record.key, fields)
        if "cls" in read:
            fields.setdefault("cls", _class(read.pop("cls")))
        image, audio, video = (
            _only(record.key, read, kind, extensions)
            for kind, extensions in (("images", IMAGE_EXTENSIONS), ("recordings", AUDIO_EXTENSIONS), ("videos", VIDEO_EXTENSIONS))
        )
        return RawSample(image=image, audio=audio, video=video, captions=captions, fields=fields, extra=read)

    def _distinct(self, records: list[Record]) -> list[Record]:
        """Put the tar's name before keys that several tars use, as numbered ones do; its number too where tars share the name."""
        tars_of = Counter(key for key, _ in {(r.key, r.locator[0]) for r in records if r.locator is not None})
        return [
            replace(r, key=safe_key(f"{self._prefixes[r.locator[0]]}-{r.key}")) if r.locator is not None and tars_of[r.key] > 1 else r
            for r in records
        ]

    def _read(self, key: str, file_number: int, extension: str, place: tuple[int, int]) -> bytes:
        offset, size = place
        name, limit = self._limits.get(extension, self._other)
        if size > limit:
            raise SampleError(key, "file_too_large", f"The part {extension!r} has {size} bytes; {name} is {limit}.")
        path = self._files[file_number]
        try:
            if self._open is None or self._open[0] != file_number:
                self._close()
                self._open = file_number, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._open[1], size, offset)
        except OSError as e:
            raise SourceError(f"Reading the tar {str(path)!r} failed: {e}. Mend that and repeat the command; it goes on from here.") from e
        if len(data) != size:
            raise SampleError(key, "truncated", f"The tar {path.name!r} ends in the middle of this sample.")
        return data

    def _close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        self._close()


def _media(config: WriteConfig) -> dict[str, tuple[Sequence[str], int]]:
    """Extensions and largest size of each kind."""
    return {"audio": (AUDIO_EXTENSIONS, config.audio.max_bytes), "video": (VIDEO_EXTENSIONS, config.video.max_bytes)}


def _only(key: str, read: dict[str, bytes], kinds: str, extensions: Sequence[str]) -> bytes | None:
    """Take the one part of a kind."""
    found = [extension for extension in extensions if extension in read]
    if len(found) > 1:
        raise SampleError(key, "duplicate_part", f"The sample has several {kinds}: {', '.join(found)}.")
    return read.pop(found[0]) if found else None


def _scan(number: int, file: Path, prefix: str) -> Iterator[Record]:
    """Group the members of a tar into records."""
    key: str | None = None
    parts: list[Part] = []
    fault: str | None = None
    try:
        for name, part in _members(file):
            if name != key:
                if key is not None:
                    yield _record(number, file, key, parts)
                key, parts = name, []
            parts.append(part)
    except tarfile.ReadError as e:
        fault = str(e)
    except OSError as e:
        raise SourceError(f"Reading the tar {str(file)!r} failed: {e}. Mend that and repeat the command.") from e
    if key is not None:
        yield _record(number, file, key, parts)
    if fault is not None:
        detail = f"{file.name} is no uncompressed tar, or is cut short or damaged: {fault}."
        yield Record(safe_key(f"{prefix}-rest"), f"{file.name}:", None, ("broken_tar", detail))


def _members(file: Path) -> Iterator[tuple[str, Part]]:
    """Yield key and part of every member that belongs to a sample.

    tarfile ends without a word at a cut between members, hence the look at what lies where it stopped.
    """
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            split = split_name(member.name)
            if member.isreg() and split is not None:
                yield split[0], (split[1], member.offset_data, member.size)
        end = tar.offset
    with file.open("rb") as raw:
        raw.seek(end)
        if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")


def _record(number: int, file: Path, name: str, parts: list[Part]) -> Record:
    where = f"{file.name}:{name}"
    repeated = [extension for extension, count in Counter(extension for extension, _, _ in parts).items() if count > 1]
    problem = ("duplicate_part", f"The part {repeated[0]!r} is there twice.") if repeated else None
    return Record(safe_key(name), where, (number, tuple(parts)), problem)


def _class(data: bytes) -> int | str:
    text = data.decode("utf-8", "replace").strip()
    return int(text) if text.isdecimal() else text
