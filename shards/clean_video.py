"""Video: refuse what cannot be used; keep the file, or turn it into pictures at even distances."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from shards import jpeg
from shards.clean_image import encode_image, shrunk
from shards.config import ImageConfig, VideoConfig
from shards.errors import SampleError
from shards.media import FRAME_DIGITS, quarter_turns, shown_size

EXTENSIONS = {"mov": "mp4", "mp4": "mp4", "webm": "webm", "matroska": "mkv"}
"""Containers that are kept, as ffmpeg names them; a gif always becomes pictures."""
MOST_FRAMES = 10**FRAME_DIGITS
_SHORTFALL = 0.9
"""Share of the promised frames or seconds below which a file is taken for cut off; headers are often a little wrong."""


@dataclass(frozen=True, slots=True)
class CleanVideo:
    """A video, as one part or as a part a picture."""

    parts: dict[str, bytes]
    """By extension: `mp4`, or `000.jpg`, `001.jpg`, ..."""
    duration_s: float
    frames: int
    """Pictures in the parts."""
    fps: float
    """Pictures a second of the parts."""
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class _Header:
    container: str
    duration_s: float | None
    frames: int
    """Promised; 0 if nothing is."""
    fps: float


def clean_video(key: str, data: bytes, config: VideoConfig) -> CleanVideo:
    """Check one video and keep it, or cut it into pictures.

    Raises:
        SampleError: `empty_file`, `not_a_video`, `truncated`, `damaged_video`, `video_too_long` or `too_many_frames`.
    """
    with _opened(key, data) as container:
        header = _header(container)
        _check_length(key, header.duration_s, config)
        if config.mode == "keep" and header.container in EXTENSIONS:
            return _kept(key, data, container, header, config)
        return _pictures(key, container, header, config)


def check_video(key: str, data: bytes) -> None:
    """Decode every picture.

    Raises:
        SampleError: `empty_file`, `not_a_video`, `truncated` or `damaged_video`.
    """
    with _opened(key, data) as container:
        header = _header(container)
        _check_whole(key, header, *_end(_times(key, container)))


@contextmanager
def _opened(key: str, data: bytes) -> Iterator[Any]:
    """Open a file that has pictures; what FFmpeg finds wrong with it is the sample's error."""
    if not data:
        raise SampleError(key, "empty_file", "The video has no bytes.")
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                raise _without_pictures(key, container)
            container.streams.video[0].thread_type = "NONE"  # a writer process is one of many
            yield container
    except av.FFmpegError as e:
        looks_like_one = data[4:8] == b"ftyp" or data.startswith((b"\x1a\x45\xdf\xa3", b"GIF8"))
        reason, what = ("damaged_video", "does not decode") if looks_like_one else ("not_a_video", "is no video")
        raise SampleError(key, reason, f"The file of {len(data)} bytes {what}: {e.strerror}.") from e


def _without_pictures(key: str, container: Any) -> SampleError:
    name = container.format.name
    if container.streams.audio:
        return SampleError(key, "not_a_video", f"The {name} file has sound, but no video stream.")
    return SampleError(key, "damaged_video", f"The {name} file has neither pictures nor sound: its header is damaged or cut off.")


def _header(container: Any) -> _Header:
    stream = container.streams.video[0]
    names = container.format.name.split(",")
    name = "webm" if "webm" in names and _is_webm(container) else names[0]
    duration_s = None if container.duration is None else container.duration / av.time_base
    return _Header(name, duration_s, stream.frames, float(stream.average_rate or stream.guessed_rate or 0))


def _is_webm(container: Any) -> bool:
    """A webm is a matroska of some codecs only."""
    return container.streams.video[0].codec_context.name in ("vp8", "vp9", "av1", "libdav1d")


def _check_length(key: str, duration_s: float | None, config: VideoConfig) -> None:
    if config.max_seconds is not None and duration_s is not None and duration_s > config.max_seconds:
        raise SampleError(key, "video_too_long", f"The video lasts {duration_s:.2f} s; video.max_seconds is {config.max_seconds:g}.")


def _kept(key: str, data: bytes, container: Any, header: _Header, config: VideoConfig) -> CleanVideo:
    """Keep the file if its first picture decodes and all that the header promises is there."""
    stream = container.streams.video[0]
    first: Any = next(container.decode(stream), None)
    if first is None:
        raise SampleError(key, "damaged_video", "No picture of the video decodes.")
    container.seek(0, stream=None)
    count, end_s = 0, 0.0
    for packet in container.demux(stream):
        if packet.size:
            count += 1
            end_s = max(end_s, float((packet.pts or 0) * packet.time_base))
    _check_whole(key, header, count, end_s)
    duration_s = header.duration_s if header.duration_s is not None else end_s
    _check_length(key, duration_s, config)
    fps = header.fps or count / max(duration_s, 1e-6)
    return CleanVideo({EXTENSIONS[header.container]: data}, duration_s, count, fps, *shown_size(first))


def _check_whole(key: str, header: _Header, count: int, end_s: float) -> None:
    promised = float(header.frames)
    if header.duration_s is not None and header.fps:  # an edit list shows a part of the pictures that the file holds
        promised = min(promised, header.duration_s * header.fps)
    if count < _SHORTFALL * promised:
        raise SampleError(key, "truncated", f"The video ends after {count} of {promised:.0f} pictures.")
    interval_s = 1 / header.fps if header.fps else 0.0
    if header.duration_s is not None and end_s + 2 * interval_s < _SHORTFALL * header.duration_s:
        raise SampleError(key, "truncated", f"The video ends after {end_s:.2f} of {header.duration_s:.2f} s.")


def _pictures(key: str, container: Any, header: _Header, config: VideoConfig) -> CleanVideo:
    """Decode all of it and encode the pictures wanted: those at even distances, or those next after even times."""
    times = _times(key, container)
    _check_whole(key, header, *_end(times))
    interval_s = 1 / header.fps if header.fps else 0.0
    duration_s = header.duration_s if header.duration_s is not None else times[-1] - times[0] + interval_s
    _check_length(key, duration_s, config)
    wanted = _wanted(times, duration_s, config)
    if len(wanted) > MOST_FRAMES:
        raise SampleError(key, "too_many_frames", f"{len(wanted)} pictures are wanted of the video; there is room for {MOST_FRAMES}.")
    container.seek(0, stream=None)
    parts, size = _encoded(container, wanted, config)
    fps = config.fps if config.fps is not None else len(parts) / max(duration_s, 1e-6)
    return CleanVideo(parts, duration_s, len(parts), fps, *size)


def _times(key: str, container: Any) -> list[float]:
    """When each picture is shown, in seconds."""
    times = [float(frame.time or 0.0) for frame in _decoded(container)]
    if not times:
        raise SampleError(key, "damaged_video", "No picture of the video decodes.")
    return times


def _end(times: Sequence[float]) -> tuple[int, float]:
    return len(times), times[-1]


def _decoded(container: Any) -> Iterator[Any]:
    return iter(container.decode(container.streams.video[0]))


def _wanted(times: Sequence[float], duration_s: float, config: VideoConfig) -> list[int]:
    """Numbers of the pictures to keep, in order."""
    if config.fps is None:
        count = min(config.frames, len(times))
        return [(2 * i + 1) * len(times) // (2 * count) for i in range(count)]
    moments = np.arange(max(1, int(duration_s * config.fps + 1e-6))) / config.fps
    numbers: list[int] = np.minimum(np.searchsorted(np.asarray(times) - times[0], moments - 1e-6), len(times) - 1).tolist()
    return numbers


def _encoded(container: Any, wanted: Sequence[int], config: VideoConfig) -> tuple[dict[str, bytes], tuple[int, int]]:
    parts: dict[str, bytes] = {}
    size = (0, 0)
    settings = ImageConfig(quality=config.quality)
    waiting = list(reversed(wanted))
    for number, frame in enumerate(_decoded(container)):
        if not waiting:
            break
        if number != waiting[-1]:
            continue
        pixels: jpeg.Pixels = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns(frame))
        size = shrunk((pixels.shape[1], pixels.shape[0]), config.short_side)
        data = encode_image(np.ascontiguousarray(pixels), size, "JPEG", settings)
        while waiting and waiting[-1] == number:  # more pictures a second than there are
            parts[f"{len(parts):0{FRAME_DIGITS}d}.jpg"] = data
            waiting.pop()
    return parts, size
