"""What a sample is: a key and its parts, in the WebDataset layout of one tar member `KEY.EXT` a part."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""Image parts, in the order in which `Sample.image` prefers them."""
AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg", "opus", "m4a")
"""Audio parts."""
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
"""Video parts."""
MEMBER_NAME_BYTES = 100
"""Longest name of a ustar member, which is what webdataset's TarWriter writes."""

_EXTENSION = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)*")


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One sample of a data set.

    Args:
        key: its name, unique in its shard.
        parts: bytes by extension without the leading dot: "jpg", "txt", "json", "000.jpg".
    """

    key: str
    parts: Mapping[str, bytes]

    def __repr__(self) -> str:
        """Name the parts and their sizes, not their bytes."""
        parts = ", ".join(f"{ext}: {len(data)} B" for ext, data in self.parts.items())
        return f"Sample({self.key!r}, {{{parts}}})"

    def image(self) -> tuple[str, bytes] | None:
        """Return (image format such as "jpg", bytes) of the sample's picture, or None.

        `KEY.jpg` goes before `KEY.some.jpg`; numbered frames (`KEY.000.jpg`) are a video, not a picture.
        """
        for ext in IMAGE_EXTENSIONS:
            if ext in self.parts:
                return ext, self.parts[ext]
        for name in sorted(self.parts):
            stem, _, ext = name.rpartition(".")
            if ext in IMAGE_EXTENSIONS and not stem.isdecimal():
                return ext, self.parts[name]
        return None

    def captions(self) -> list[str]:
        """Return the captions: `KEY.txt`, or else `captions` or `caption` of `KEY.json`. Blank ones are left out.

        Raises:
            SampleError: the text is not UTF-8, or the captions are no strings.
        """
        if "txt" in self.parts:
            found: Any = self._text("txt")
        else:
            fields = self.fields()
            found = fields.get("captions")
            if found is None:
                found = fields.get("caption")
        captions = [found] if isinstance(found, str) else [] if found is None else found
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise SampleError(self.key, "bad_captions", f"captions in json must be strings, not {found!r:.80}.")
        return [c.strip() for c in captions if c.strip()]

    def fields(self) -> dict[str, Any]:
        """Return the parsed `KEY.json`, or an empty mapping where there is none.

        Raises:
            SampleError: it is not UTF-8, not JSON, or not a mapping.
        """
        if "json" not in self.parts:
            return {}
        try:
            fields = json.loads(self._text("json"))
        except (ValueError, RecursionError) as e:
            raise SampleError(self.key, "bad_json", f"its json part cannot be parsed: {e}.") from e
        if not isinstance(fields, dict):
            raise SampleError(self.key, "bad_json", f"its json part must hold a mapping, not a {type(fields).__name__}.")
        return fields

    def _text(self, ext: str) -> str:
        try:
            return self.parts[ext].decode("utf-8")
        except UnicodeDecodeError as e:
            raise SampleError(self.key, "not_utf8", f"its {ext} part is not UTF-8: {e.reason} at byte {e.start}.") from e


def validate(sample: Sample) -> None:
    """Check what a writer must hold to: key, extensions, text and fields. Media are not decoded.

    Raises:
        SampleError: with reason bad_key, bad_extension, name_too_long, no_parts, empty_part, not_utf8, bad_json or bad_captions.
    """
    check_key(sample.key)
    if not sample.parts:
        raise SampleError(sample.key, "no_parts", "it holds nothing: neither a picture, a text nor fields.")
    for ext, data in sample.parts.items():
        if not _EXTENSION.fullmatch(ext):
            raise SampleError(sample.key, "bad_extension", f"{ext!r} must be of lower-case letters and digits, as 'jpg' or '000.jpg'.")
        if len(f"{sample.key}.{ext}".encode()) > MEMBER_NAME_BYTES:
            raise SampleError(sample.key, "name_too_long", f"KEY.{ext} is over {MEMBER_NAME_BYTES} bytes; shorten the key.")
        if not data:
            raise SampleError(sample.key, "empty_part", f"its {ext} part has no bytes.")
    sample.fields()
    sample.captions()


def check_key(key: str) -> None:
    """Check that a key survives the way through a tar: WebDataset splits a name at the first dot of its base name.

    Raises:
        SampleError: with reason bad_key.
    """
    if not key:
        raise SampleError(repr(key), "bad_key", "a key must not be empty.")
    if key.startswith("__"):
        raise SampleError(key, "bad_key", "a key must not begin with two underscores: WebDataset keeps such names for metadata.")
    for char in key:
        if char in "/." or unicodedata.category(char) in ("Cc", "Cs"):
            raise SampleError(repr(key), "bad_key", f"a key must hold no '/', '.', control character or surrogate; got {char!r}.")


def split_name(name: str) -> tuple[str, str] | None:
    """Split a tar member's name into (key, extension) as WebDataset does, or return None for a member that is no part of a sample.

    The key keeps its directory and ends at the first dot of the base name; the extension is lower-cased. Metadata (`__name__`) and
    hidden files are no parts.
    """
    if re.match(r"__[^/]*__($|/)", name):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, ext = base.partition(".")
    return (folder + slash + stem, ext.lower()) if stem and dot else None
