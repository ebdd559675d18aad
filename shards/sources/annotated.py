"""What the sources of annotated sets share: a json of annotations is listed, the media lie in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.config import WriteConfig
from shards.errors import ConfigError, SourceError
from shards.sources.record import RawSample, Record, read_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the annotations say of one sample; plain values, as its repr tells whether the source has changed."""

    images: tuple[str, ...] = ()
    """Names of its images, from the folder of images on; several are one sample of several pictures."""
    audio: str | None = None
    """Name of its recording, likewise."""
    captions: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


class AnnotatedSource:
    """Samples whose record holds an `Entry`.

    Args:
        config: what is written.
        folder: that the names of media start from.
    """

    def __init__(self, config: WriteConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def load(self, record: Record) -> RawSample:
        """Read the media of one sample."""
        entry: Entry = record.locator
        limit = self._config.image.max_bytes
        images = [read_file(record.key, self._folder / name, limit) for name in entry.images]
        audio = None if entry.audio is None else read_file(record.key, self._folder / entry.audio, self._config.audio.max_bytes)
        alone = images[0] if len(images) == 1 else None
        pictures = images if len(images) > 1 else ()
        return RawSample(image=alone, pictures=pictures, audio=audio, captions=entry.captions, fields=entry.fields)


def read_json(path: Path, kind: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read a json file of annotations.

    Args:
        path: the file.
        kind: what it should be, for errors.
        keys: lists that it must have.

    Raises:
        SourceError: it cannot be read, is no JSON, or lacks a key.
    """
    content = parse_json(read_text(path, kind), path, kind)
    missing = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        found = ", ".join(sorted(map(str, content))[:8]) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise SourceError(f"{str(path)!r} is no {kind}: it has no list `{missing[0]}`; it holds {found or 'nothing'}. Give another `path`.")
    return dict(content)


def read_text(path: Path, kind: str) -> str:
    """Read a text file whole.

    Raises:
        SourceError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise SourceError(f"There is no {kind} at {str(path)!r}. Give the `path` of an existing file.") from e
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"The {kind} {str(path)!r} cannot be read: {e}. Give the `path` of another file.") from e


def parse_json(text: str, path: Path, kind: str) -> Any:
    """Parse JSON.

    Raises:
        SourceError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{str(path)!r} is no {kind}: it is not JSON ({e}). Download it again, or give another `path`.") from e


def each(content: Mapping[str, Any], name: str, keys: Sequence[str], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a list of annotations.

    Raises:
        SourceError: one is no mapping or lacks a key.
    """
    for number, entry in enumerate(content[name]):
        missing = [key for key in keys if not isinstance(entry, dict) or entry.get(key) is None]
        if missing:
            raise SourceError(f"Entry {number} of `{name}` in {str(path)!r} has no `{missing[0]}`: {entry!r:.120}. Mend the file.")
        strange = [key for key in keys if key.endswith("id") and not isinstance(entry[key], (int, str))]
        if strange:
            raise SourceError(
                f"Entry {number} of `{name}` in {str(path)!r} has a `{strange[0]}` that is neither a number nor a text: {entry!r:.120}. "
                "Mend the file."
            )
        yield entry


def media_folder(config: WriteConfig, usual: Iterable[Path]) -> Path:
    """Find the folder of the media: the one that is named, or the first of the usual places that exists.

    Raises:
        SourceError: there is none.
    """
    given = config.annotations.images
    if given is not None:
        if not Path(given).is_dir():
            raise SourceError(f"`annotations.images`: there is no folder at {given!r}. Name the folder that holds the files.")
        return Path(given)
    if not Path(config.path or "").is_file():
        raise SourceError(f"There is no file at {config.path!r}. Give the `path` of the annotations.")
    places = list(usual)
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(repr(str(place)) for place in places)
    raise SourceError(
        f"The files that {config.path!r} names are in none of the usual places, {looked}. Set annotations.images to their folder."
    )


def check_splits(wanted: Sequence[str], found: Iterable[str], path: Path) -> None:
    """Check that every split asked for is there.

    Raises:
        ConfigError: one is not.
    """
    present = sorted(set(found))
    for name in wanted:
        if name not in present:
            raise ConfigError(f"`annotations.splits`: {str(path)!r} has no {name!r}; it has {', '.join(present)}. Name some of them.")
