"""Small audio and video files, made on the fly."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import soundfile


def tone(seconds: float = 1.0, rate: int = 16000, channels: int = 1, kind: str = "WAV", hertz: float = 440.0) -> bytes:
    """A sine of amplitude one half."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.repeat(wave[:, None], channels, axis=1), rate, format=kind)
    return buffer.getvalue()


def clip(frames: int = 30, rate: int = 10, kind: str = "mp4", width: int = 64, height: int = 48) -> bytes:
    """A video whose picture n is grey of brightness 8 n."""
    buffer = io.BytesIO()
    codec = {"mp4": "mpeg4", "webm": "libvpx", "matroska": "mpeg4", "gif": "gif"}[kind]
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        for number in range(frames):
            pixels = np.full((height, width, 3), min(255, 8 * number), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound_only_mp4() -> bytes:
    """An mp4 without a picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
