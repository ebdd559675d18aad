"""A folder of images, audio and video, each with a `.txt` (its caption) and/or a `.json` (fields, captions) of the same name beside it.

What the paths say becomes fields where it is asked for: the class of an ImageFolder, the fold of a recording.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards.config import WriteConfig
from shards.errors import SampleError, SourceError
from shards.sample import IMAGE_EXTENSIONS
from shards.sources.record import RawSample, Record, read_file, refuse_shared_keys, safe_key

IMAGE_FILES = frozenset(IMAGE_EXTENSIONS) | {"jfif", "avif", "jp2", "ico", "tga"}
AUDIO_FILES = frozenset({"flac", "wav", "mp3", "ogg"})
VIDEO_FILES = frozenset({"mp4", "webm", "mkv", "mov", "avi"})
KINDS = {
    **dict.fromkeys(IMAGE_FILES, "image"),
    **dict.fromkeys(AUDIO_FILES, "audio"),
    **dict.fromkeys(VIDEO_FILES, "video"),
    "txt": "txt",
    "json": "json",
}
"""What a file is, by its extension; a gif is an image."""


class FolderSource:
    """Images below a folder, at any depth; hidden files and other kinds of files are no samples."""

    def __init__(self, config: WriteConfig) -> None:
        self._root = Path(config.path or "")
        self._config = config
        self._image = config.image
        self._pattern = None if config.folder.pattern is None else re.compile(config.folder.pattern)

    def records(self) -> list[Record]:
        """List the images, audio and video, and the texts that have none of them, by path.

        A link is followed to a file inside the folder; a link out of it, a broken one, and a link to a folder are refused.
        """
        if not self._root.is_dir():
            raise SourceError(f"There is no folder at {str(self._root)!r}. Give the `path` of an existing folder.")
        found = sorted(self._walk(), key=lambda record: record.where)
        if not found:
            raise SourceError(f"The folder {str(self._root)!r} holds no image, audio, video or text. Give another `path`.")
        if self._pattern is not None:
            pattern = self._pattern
            matching = [record for record in found if pattern.fullmatch(record.where)]
            if not matching:
                raise SourceError(
                    f"`folder.pattern` {pattern.pattern!r} matches none of the {len(found)} paths in {str(self._root)!r}, such as "
                    f"{found[0].where!r}. It must match the whole path below the folder."
                )
            found = matching
        return refuse_shared_keys(found if self._config.folder.listed is None else _listed(found, Path(self._config.folder.listed)))

    def load(self, record: Record) -> RawSample:
        """Read an image and its texts."""
        *media_files, text_file, fields_file = record.locator[:5]
        fields = self._fields(record.key, fields_file) if fields_file else {}
        captions: Sequence[Any] = []
        if text_file:
            captions = self._captions(self._read(record.key, text_file))
        else:
            captions = pop_captions(record.key, fields)
        limits = (self._config.image.max_bytes, self._config.audio.max_bytes, self._config.video.max_bytes)
        image, audio, video = (
            read_file(record.key, f"{self._root}/{name}", limit) if name else None for name, limit in zip(media_files, limits, strict=True)
        )
        return RawSample(image=image, audio=audio, video=video, captions=captions, fields=fields | self._said_by(record))

    def _said_by(self, record: Record) -> dict[str, str]:
        """Fields that the path of a sample gives."""
        said: dict[str, str] = {}
        if self._config.folder.label is not None:
            label, _, name = record.where.partition("/")
            if not name:
                raise SampleError(record.key, "no_label", "The file lies in no folder, whose name `folder.label` takes for its class.")
            said[self._config.folder.label] = label
        match = self._pattern.fullmatch(record.where) if self._pattern is not None else None
        return said if match is None else said | {name: text for name, text in match.groupdict().items() if text is not None}

    def _captions(self, text: bytes) -> Sequence[bytes]:
        if not self._config.caption.one_a_line or text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return [text]
        return text.splitlines()

    def _read(self, key: str, name: str) -> bytes:
        return read_file(key, f"{self._root}/{name}", self._image.max_bytes)

    def _fields(self, key: str, name: str) -> dict[str, Any]:
        return parse_fields(key, self._read(key, name))

    def _walk(self) -> Iterator[Record]:
        root = self._root.resolve()
        for folder, subfolders, names in os.walk(self._root, onerror=_fail):
            relative = Path(folder).relative_to(self._root)
            for name in subfolders:
                if (Path(folder) / name).is_symlink():
                    where = (relative / name).as_posix()
                    yield Record(
                        safe_key(where),
                        where,
                        None,
                        ("linked_folder", f"{where} is a link to a folder; links to folders are not followed."),
                    )
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            yield from self._samples_of(root, relative, sorted(names))

    def _samples_of(self, root: Path, relative: Path, names: list[str]) -> Iterator[Record]:
        """Pair the files of one folder by their names without the extension."""
        files: dict[str, dict[str, list[str]]] = {}
        for name in names:
            stem, dot, extension = name.rpartition(".")
            kind = KINDS.get(extension.lower())
            if dot and kind is not None and not name.startswith("."):
                files.setdefault(stem, {}).setdefault(kind, []).append(name)
        for stem, found in files.items():
            media = {kind: found.get(kind, []) for kind in ("image", "audio", "video")}
            # Two images of one name are two records of one key, of which neither will be taken.
            for number in range(max(1, *map(len, media.values()))):
                chosen = [names[number] if number < len(names) else None for names in media.values()]
                texts = [found[kind][0] if kind in found else None for kind in ("txt", "json")]
                yield self._record(root, relative, stem, (*chosen, *texts))

    def _record(self, root: Path, relative: Path, stem: str, names: tuple[str | None, ...]) -> Record:
        below = "" if relative == Path() else f"{relative.as_posix()}/"
        files = [below + name if name else None for name in names]
        first = next(file for file in files if file)
        key = safe_key(below + stem)
        sizes = []
        for file in files:
            if file is None:
                continue
            size = self._size(root, file)
            if not isinstance(size, int):
                return Record(key, first, None, size)
            sizes.append(size)
        return Record(key, first, (*files, tuple(sizes)))

    def _size(self, root: Path, file: str) -> int | tuple[str, str]:
        """Bytes of a file, so that a changed source is noticed, -1 for one that just vanished, which reading will refuse; or a problem."""
        path = f"{self._root}/{file}"
        try:
            status = os.lstat(path)
            if not stat.S_ISLNK(status.st_mode):
                return status.st_size
        except OSError:
            return -1
        try:
            target = Path(path).resolve(strict=True)
        except (OSError, RuntimeError):
            return "missing_file", f"{file} is a link that leads nowhere."
        if not target.is_relative_to(root):
            return "outside_folder", f"{file} is a link out of the folder."
        return target.stat().st_size


def _listed(found: Sequence[Record], path: Path) -> list[Record]:
    """Keep the records that a list names; a line that names none is a missing file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"`folder.listed`: {str(path)!r} cannot be read as UTF-8 text: {e}. Give a file of paths, a line each.") from e
    by_name = {name: record for record in found for name in (record.where.rpartition(".")[0], record.where)}
    kept: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        record = by_name.get(name) or by_name.get(name.rsplit(maxsplit=1)[0] if name else "")
        if record is not None:
            kept[record.where] = record
        elif name:
            where = f"{path.name}:{number}"
            kept[where] = Record(safe_key(name), where, None, ("missing_file", f"The folder holds no {name!r}."))
    if all(record.problem is not None for record in kept.values()):
        raise SourceError(f"`folder.listed`: no line of {str(path)!r} names a file of the folder, such as {found[0].where!r}. Check both.")
    return list(kept.values())


def parse_fields(key: str, data: bytes) -> dict[str, Any]:
    """Parse a KEY.json.

    Raises:
        SampleError: `bad_json`.
    """
    try:
        fields = json.loads(data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as e:
        raise SampleError(key, "bad_json", f"The json cannot be parsed: {e}.") from e
    if not isinstance(fields, dict):
        raise SampleError(key, "bad_json", f"The json must hold a mapping, not a {type(fields).__name__}.")
    return fields


def pop_captions(key: str, fields: dict[str, Any]) -> list[str]:
    """Take the captions out of fields: `captions` (a list) or else `caption`.

    Raises:
        SampleError: `bad_caption`, they are no strings.
    """
    name = "captions" if fields.get("captions") is not None else "caption"
    found = fields.get(name)
    if found is None:
        return []
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SampleError(key, "bad_caption", f"`{name}` of the json must be a string or a list of strings; got {found!r:.80}.")
    del fields[name]
    return captions


def _fail(error: OSError) -> None:
    raise SourceError(f"The folder {error.filename!r} cannot be listed: {error.strerror}. Give access to it, or take it away.") from error
