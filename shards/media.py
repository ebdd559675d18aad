"""What the headers of audio and video parts say: duration, sample rate, frames. Of a video the first picture is decoded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import av
import soundfile
from PIL import Image

from shards.errors import SampleError
from shards.sample import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample

FRAME_DIGITS = 3
"""Of the number of a frame: `KEY.000.jpg`."""


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """None: unknown, or there is no such part."""

    duration_s: float | None = None
    """Of the audio, or else of the video."""
    sample_rate: int | None = None
    """Of the audio, in Hz."""
    frames: int | None = None
    """Pictures of the video."""
    width: int | None = None
    height: int | None = None
    """Of the video's pictures, in pixels."""


def media_facts(sample: Sample) -> MediaFacts:
    """Look at the headers of a sample's audio and video; one that cannot be read says nothing: an index is no judge of media."""
    audio = _first(sample.parts, AUDIO_EXTENSIONS)
    heard = _audio(audio) if audio is not None else None
    video = _first(sample.parts, VIDEO_EXTENSIONS)
    seen = _video(video) if video is not None else _frames(sample)
    return MediaFacts(
        heard.duration_s if heard is not None else seen.duration_s,
        heard.sample_rate if heard is not None else None,
        seen.frames,
        seen.width,
        seen.height,
    )


def _first(parts: Mapping[str, bytes], extensions: tuple[str, ...]) -> bytes | None:
    return next((parts[extension] for extension in extensions if extension in parts), None)


def _audio(data: bytes) -> MediaFacts | None:
    try:
        info = soundfile.info(io.BytesIO(data))
    except (soundfile.SoundFileError, RuntimeError):
        return None
    return MediaFacts(info.frames / info.samplerate if info.samplerate else None, info.samplerate)


def quarter_turns(frame: av.VideoFrame) -> int:
    """How often a decoded picture is turned by 90 degrees, counter-clockwise, to be as its clip asks to be shown."""
    turned: int = frame.rotation
    return (turned // 90) % 4


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height of a decoded picture as its clip asks to be shown."""
    return (frame.height, frame.width) if quarter_turns(frame) % 2 else (frame.width, frame.height)


def _video(data: bytes) -> MediaFacts:
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                return MediaFacts()
            stream = container.streams.video[0]
            duration_s = None if container.duration is None else container.duration / av.time_base
            size, frames = (stream.width, stream.height), stream.frames or None
            with contextlib.suppress(av.FFmpegError, ValueError, EOFError, StopIteration):  # then the header's is all that is known
                size = shown_size(next(container.decode(stream)))
            return MediaFacts(duration_s, None, frames, *size)
    except (av.FFmpegError, ValueError):
        return MediaFacts()


def has_frames(parts: Iterable[str]) -> bool:
    """Whether parts are a clip, or several pictures, as numbered pictures from 0 on."""
    names = [name for name in sorted(parts) if _is_frame(name)]
    return bool(names) and int(names[0][:FRAME_DIGITS]) == 0


def _frames(sample: Sample) -> MediaFacts:
    """Of a video that was turned into numbered pictures; its duration is a field."""
    if not has_frames(sample.parts):
        return MediaFacts()
    names = [name for name in sorted(sample.parts) if _is_frame(name)]
    try:
        with Image.open(io.BytesIO(sample.parts[names[0]])) as first:
            size = first.size
        duration = sample.fields().get("duration_s")
    except (OSError, ValueError, SyntaxError, SampleError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return MediaFacts(frames=len(names))
    return MediaFacts(float(duration) if isinstance(duration, (int, float)) else None, None, len(names), *size)


def _is_frame(name: str) -> bool:
    number, _, extension = name.partition(".")
    return number.isdigit() and len(number) == FRAME_DIGITS and extension in IMAGE_EXTENSIONS
