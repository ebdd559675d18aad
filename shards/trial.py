"""A trial decode of a sample: what of it would fail in training."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
from PIL import Image

from shards.clean_audio import clean_audio
from shards.clean_image import DECODE_ERRORS
from shards.clean_video import check_video
from shards.config import AudioConfig
from shards.errors import SampleError
from shards.sample import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample

_ERRORS = (*DECODE_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning, av.FFmpegError)


def problems(sample: Sample) -> Iterator[str]:
    """Yield what is wrong with one sample: text or fields that cannot be parsed, a picture, sound or video that does not decode."""
    try:
        sample.fields()
        sample.captions()
    except SampleError as e:
        yield e.detail
    for name, data in sample.parts.items():
        problem = _problem(sample.key, name.rpartition(".")[2], data)
        if problem is not None:
            yield f"its {name} does not decode: {problem}."


def _problem(key: str, extension: str, data: bytes) -> str | None:
    try:
        if extension in IMAGE_EXTENSIONS:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        elif extension == "m4a":  # libsndfile does not read it
            with av.open(io.BytesIO(data)) as container:
                if sum(1 for _ in container.decode(audio=0)) == 0:  # all of it, to the end
                    return "it has no samples"
        elif extension in AUDIO_EXTENSIONS:
            clean_audio(key, data, AudioConfig())
        elif extension in VIDEO_EXTENSIONS:
            check_video(key, data)
    except SampleError as e:
        return e.detail.rstrip(".")
    except _ERRORS as e:
        return str(e) or type(e).__name__
    return None
