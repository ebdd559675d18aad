"""From a raw sample to one that goes into a shard, or to the reason why it does not."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shards.clean_audio import CleanAudio, clean_audio
from shards.clean_image import CleanImage, clean_image, image_size
from shards.clean_text import clean_text, decode_field
from shards.clean_video import CleanVideo, clean_video
from shards.config import WriteConfig
from shards.errors import SampleError
from shards.filter import Judge
from shards.media import FRAME_DIGITS, MediaFacts, has_frames, media_facts
from shards.sample import Sample
from shards.sources.record import RawSample, Record

# KEY.json describes what was written under these names; what the source had there moves to `input_NAME`.
OWN_FIELDS = ("width", "height", "source", "sha256")


@dataclass(frozen=True, slots=True)
class CleanSample:
    """The parts of one sample, ready to be written, and what the index says about it."""

    key: str
    parts: dict[str, bytes]
    width: int | None
    height: int | None
    caption_length: int | None
    media: MediaFacts
    """Of audio and video."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample that the filter leaves out, though nothing is wrong with it."""

    key: str
    reason: str


def clean_sample(record: Record, raw: RawSample, config: WriteConfig, judge: Judge | None = None) -> CleanSample | LeftOut:
    """Clean every part of a sample, unless the filter leaves it out.

    Args:
        record: its place in the source.
        raw: what was read there.
        config: what is done to it.
        judge: the filter; None keeps everything.

    Raises:
        SampleError: the sample is refused; its reason is one of those in docs/shards.md.
    """
    captions = _captions(record.key, raw, config)
    if judge is not None:
        width, height = image_size(record.key, raw.image, config.image) if raw.image is not None else (None, None)
        reason = judge(width, height, captions, raw.fields)
        if reason is not None:
            return LeftOut(record.key, reason)
    image = _image(record.key, raw, config)
    audio = clean_audio(record.key, raw.audio, config.audio) if raw.audio is not None else None
    video = clean_video(record.key, raw.video, config.video) if raw.video is not None else None
    pictures = [clean_image(record.key, picture, config.image) for picture in raw.pictures]
    fields = _fields(record, raw, image, audio, video)
    parts = dict(raw.extra)
    for extension, data in _media_parts(image, audio, video):
        _put(record.key, parts, extension, data)
    for number, picture in enumerate(pictures):
        _put(record.key, parts, f"{number:0{FRAME_DIGITS}d}.{picture.extension}", picture.data)
    if len(captions) == 1:
        _put(record.key, parts, "txt", captions[0].encode("utf-8"))
    elif captions:
        fields["captions"] = captions
    _put(record.key, parts, "json", _json(record.key, fields, config))
    facts = media_facts(Sample(record.key, parts)) if audio is not None or video is not None or pictures or raw.extra else MediaFacts()
    width, height = (image.width, image.height) if image is not None else (facts.width, facts.height)
    longest = max(map(len, captions), default=None)
    return CleanSample(record.key, parts, width, height, longest, facts)


def _media_parts(image: CleanImage | None, audio: CleanAudio | None, video: CleanVideo | None) -> Iterator[tuple[str, bytes]]:
    if image is not None:
        yield image.extension, image.data
        yield from image.smaller.items()
    if audio is not None:
        yield audio.extension, audio.data
    if video is not None:
        yield from video.parts.items()


def _captions(key: str, raw: RawSample, config: WriteConfig) -> list[str]:
    cleaned = [clean_text(key, caption, config.caption) for caption in raw.captions]
    captions = list(dict.fromkeys(caption for caption in cleaned if caption))
    if not captions and config.caption_required():
        if cleaned:
            raise SampleError(key, "empty_caption", "The caption is empty or only white space.")
        raise SampleError(key, "no_caption", "There is no caption; caption.required=false would write the sample without one.")
    return captions


def _image(key: str, raw: RawSample, config: WriteConfig) -> CleanImage | None:
    if raw.image is not None:
        return clean_image(key, raw.image, config.image)
    if config.image.required and raw.audio is None and raw.video is None and not raw.pictures and not has_frames(raw.extra):
        raise SampleError(key, "no_image", "There is no image; image.required=false would write the sample without one.")
    return None


def _fields(record: Record, raw: RawSample, image: CleanImage | None, audio: CleanAudio | None, video: CleanVideo | None) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if video is not None and raw.video is not None:
        own |= {"duration_s": video.duration_s, "frames": video.frames, "fps": video.fps, "width": video.width, "height": video.height}
        own["video_sha256"] = hashlib.sha256(raw.video).hexdigest()
    if audio is not None and raw.audio is not None:
        own |= {"duration_s": audio.duration_s, "sample_rate": audio.sample_rate, "channels": audio.channels}
        own["audio_sha256"] = hashlib.sha256(raw.audio).hexdigest()
    if image is not None and raw.image is not None:
        own |= {"width": image.width, "height": image.height, "sha256": hashlib.sha256(raw.image).hexdigest()}
    own["source"] = record.where
    taken = {*OWN_FIELDS, *own}
    return {f"input_{name}" if name in taken else name: _plain(value) for name, value in raw.fields.items()} | own


def _plain(value: Any) -> Any:
    """A value that JSON can hold: no NaN, no bytes, no dates or other objects of tables."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _json(key: str, fields: dict[str, Any], config: WriteConfig) -> bytes:
    try:
        return _dump(fields)
    except UnicodeEncodeError:
        return _dump(decode_field(key, fields, config.caption))


def _dump(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, allow_nan=False).encode("utf-8")


def _put(key: str, parts: dict[str, bytes], extension: str, data: bytes) -> None:
    if extension in parts:
        raise SampleError(key, "duplicate_part", f"Two inputs would become {key}.{extension}.")
    parts[extension] = data
