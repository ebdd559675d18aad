"""Small audio and video files, made on the fly."""

from __future__ import annotations

import io
import struct
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


def turned_clip(degrees: int) -> bytes:
    """An mp4 of 64 x 48 with a red left half that asks to be shown turned counter-clockwise."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(degrees)
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = (255, 0, 0)
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def trimmed_clip(frames: int, shown: int) -> bytes:
    """An mp4 that holds more pictures than it shows, as telephones trim them: an edit list ends sooner, and the duration with it."""
    data = bytearray(clip(frames))
    places = [data.find(name) + offset for name, offset in ((b"elst", 12), (b"mvhd", 20), (b"tkhd", 24))]
    for place in places:
        (whole,) = struct.unpack(">I", data[place : place + 4])
        data[place : place + 4] = struct.pack(">I", whole * shown // frames)
    return bytes(data)


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
