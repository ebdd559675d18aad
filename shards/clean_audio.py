"""Audio: refuse what cannot be used, cut, mix down, resample, encode with 16 bits; or keep the bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from shards.config import AudioConfig
from shards.errors import SampleError

EXTENSIONS = {"FLAC": "flac", "WAV": "wav", "WAVEX": "wav", "MP3": "mp3", "MPEG": "mp3", "OGG": "ogg"}
"""Formats whose bytes are kept, as soundfile names them."""
_ENDLESS = 1 << 62  # what libsndfile says of a stream whose length it does not know
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # in a RIFF header that was written to a pipe

Samples = npt.NDArray[np.float32]
"""(samples, channels), from -1 to 1."""


@dataclass(frozen=True, slots=True)
class CleanAudio:
    """An audio part that libsndfile reads."""

    extension: str
    data: bytes
    duration_s: float
    sample_rate: int
    """In Hz."""
    channels: int


def clean_audio(key: str, data: bytes, config: AudioConfig) -> CleanAudio:
    """Check, cut, mix, resample and encode one recording; the bytes are kept when nothing needs to change.

    Raises:
        SampleError: `empty_file`, `not_audio`, `no_samples`, `truncated` or `audio_too_long`.
    """
    if not data:
        raise SampleError(key, "empty_file", "The audio has no bytes.")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            return _clean(key, data, sound, config)
    except soundfile.LibsndfileError as e:
        reason = "truncated" if data.startswith((b"RIFF", b"fLaC", b"OggS", b"ID3")) else "not_audio"
        raise SampleError(key, reason, f"The audio ({len(data)} bytes) does not decode: {e.error_string}") from e


def _clean(key: str, data: bytes, sound: soundfile.SoundFile, config: AudioConfig) -> CleanAudio:
    samples = _decoded(key, data, sound, config)
    rate = config.sample_rate or sound.samplerate
    mixed = config.channels == "mono" and sound.channels > 1
    cut = sound.frames < _ENDLESS and len(samples) < sound.frames
    target = EXTENSIONS.get(sound.format) if config.format == "auto" else config.format
    if not mixed and not cut and rate == sound.samplerate and target is not None and target == EXTENSIONS.get(sound.format):
        return CleanAudio(target, data, len(samples) / rate, rate, sound.channels)
    if mixed:
        samples = samples.mean(axis=1, keepdims=True, dtype=np.float32)
    if rate != sound.samplerate:
        samples = soxr.resample(samples, sound.samplerate, rate, quality="HQ")
    if not len(samples):
        raise SampleError(key, "no_samples", f"Nothing is left of the audio at {rate} Hz.")
    extension = "wav" if target == "wav" else "flac"
    return CleanAudio(extension, _encoded(samples, rate, extension), len(samples) / rate, rate, samples.shape[1])


def _decoded(key: str, data: bytes, sound: soundfile.SoundFile, config: AudioConfig) -> Samples:
    """Decode to the end, or to where it is cut: a file that breaks off is noticed although its header is whole."""
    known = sound.frames < _ENDLESS
    limit = None if config.max_seconds is None else round(config.max_seconds * sound.samplerate)
    if limit is not None and known and sound.frames > limit and config.too_long == "quarantine":
        length = sound.frames / sound.samplerate
        raise SampleError(key, "audio_too_long", f"The audio lasts {length:.2f} s; audio.max_seconds is {config.max_seconds:g}.")
    wanted = sound.frames if known else -1
    if limit is not None:
        wanted = min(wanted, limit) if known else limit
    samples: Samples = sound.read(wanted, dtype="float32", always_2d=True)
    if known and 0 < len(samples) < wanted:
        raise SampleError(key, "truncated", f"The audio ends after {len(samples)} of {wanted} samples.")
    if _riff_is_cut(data):
        raise SampleError(key, "truncated", f"The header of the wav promises {_riff_bytes(data)} bytes, the file has {len(data)}.")
    if not len(samples):
        raise SampleError(key, "no_samples", "The audio has no samples.")
    return samples


def _riff_is_cut(data: bytes) -> bool:
    """libsndfile takes a wav that breaks off for a shorter one."""
    if not data.startswith(b"RIFF") or int.from_bytes(data[4:8], "little") in _UNKNOWN_SIZES:
        return False
    return _riff_bytes(data) > len(data) + 1  # some writers count a padding byte that they leave out


def _riff_bytes(data: bytes) -> int:
    return int.from_bytes(data[4:8], "little") + 8


def _encoded(samples: Samples, rate: int, extension: str) -> bytes:
    buffer = io.BytesIO()
    levels = np.rint(samples * np.float32(32768)).clip(-32768, 32767).astype(np.int16)
    soundfile.write(buffer, levels, rate, format=extension.upper(), subtype="PCM_16")
    return buffer.getvalue()
