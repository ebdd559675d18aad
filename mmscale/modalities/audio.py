"""Sound as log-mel patches. Source: Gong et al. 2021 (AST), section 2.1, here with patches that do not overlap.

Shape letters: N samples, P patches, C values of a patch.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from mmscale.modalities.mel import Floats, log_mel, log_of, power_of
from mmscale.modalities.modality import Change, Grid, Modality, Plane
from shards.configfile import need
from shards.errors import SampleError
from shards.sample import AUDIO_EXTENSIONS, Sample


@dataclass(frozen=True, kw_only=True)
class Audio(Modality):
    """The sample's sound: decoded, mixed to mono, resampled, log-mel, cut into patches of bands x frames."""

    kind: str = "audio"
    sample_rate: int = 16000
    """Hz that the sound is resampled to."""
    max_seconds: float = 10.0
    """Seconds from its beginning that are heard; shorter sound has fewer patches."""
    mels: int = 128
    """Mel bands; patch divides them."""
    mel_scale: Literal["slaney", "htk"] = "slaney"
    """The mel scale: slaney as Whisper and librosa, htk as Kaldi and AST."""
    window_ms: float = 25.0
    """Milliseconds of a spectrum's window."""
    hop_ms: float = 10.0
    """Milliseconds between spectra."""
    patch: int = 16
    """Mel bands of a patch, and its frames unless patch_frames says otherwise."""
    patch_frames: int | None = None
    """Frames of a patch; null for as many as bands. All bands and few frames (patch = mels) are whole spectra, one after another."""

    stem: int = 0
    """Channels of three convolutions within a patch before its embedding (Xiao et al. 2021), such as 8; patch must be a
    multiple of 8 and its frames of 4. 0 for a linear embedding."""

    @property
    def values(self) -> int:
        """A rectangle of the spectrogram."""
        return self.patch * self._frames

    @property
    def grid(self) -> Grid:
        """Time by bands of the longest sound."""
        return math.ceil(self.max_seconds * self.sample_rate / self._patch_samples), self.mels // self.patch, 1

    def check(self, where: str) -> None:
        """Sizes that go into one another."""
        for key in ("sample_rate", "max_seconds", "mels", "patch", "patch_frames", "window_ms", "hop_ms"):
            value = getattr(self, key)
            need(value is None or value > 0, f"`{where}.{key}` must be above 0; got {value}.")
        need(self.mels % self.patch == 0, f"`{where}.patch` must divide mels = {self.mels}; got {self.patch}.")
        need(self.stem >= 0, f"`{where}.stem` must be above 0, or 0 for none; got {self.stem}.")
        need(
            not self.stem or (self.patch % 8 == 0 and self._frames % 4 == 0),
            f"`{where}.stem` halves the bands of a patch three times and its frames twice: patch must be a multiple of 8 and "
            f"patch_frames of 4; got {self.patch} and {self._frames}.",
        )
        for key in ("window_ms", "hop_ms"):
            exact = self.sample_rate * getattr(self, key) / 1000
            need(exact >= 1 and exact == round(exact), f"`{where}.{key}` must be whole samples at {self.sample_rate} Hz; got {exact:g}.")

    @property
    def stem_plane(self) -> Plane | None:
        """Bands by frames."""
        return Plane(self.patch, self._frames, self.stem) if self.stem else None

    def read(self, sample: Sample, out_PC: NDArray[Any], change: Change) -> Grid | None:
        """Decode, augment, pad with silence to whole patches, cut along time, then along bands."""
        part = next((sample.parts[e] for e in AUDIO_EXTENSIONS if e in sample.parts), None)
        if part is None:
            return None
        wave_N = change.wave(decode_audio(part, self.sample_rate, round(self.max_seconds * self.sample_rate), key=sample.key))
        long, bands = math.ceil(len(wave_N) / self._patch_samples), self.mels // self.patch
        window = round(self.sample_rate * self.window_ms / 1000)
        wave_N = np.pad(wave_N, (0, long * self._patch_samples - len(wave_N)))
        heard = log_mel(wave_N, rate=self.sample_rate, bands=self.mels, window=window, hop=self._hop, scale=self.mel_scale)
        cut = (
            change.spectrum(heard).reshape(long, self._frames, bands, self.patch).transpose(0, 2, 3, 1)
        )  # (time, band, y = band, x = frame)
        np.copyto(out_PC[: long * bands].reshape(cut.shape), cut)
        return long, bands, 1

    def mix(self, one_PC: NDArray[Any], two_PC: NDArray[Any], share: float) -> NDArray[Any]:
        """Add two sounds as air does: the power of independent waves adds up, each turned down to its share of the amplitude.

        Source: Tokozume et al. 2018 (Learning from Between-class Examples for Deep Sound Recognition), section 3.2.
        """
        power_PC = share**2 * power_of(one_PC) + (1 - share) ** 2 * power_of(two_PC)
        return log_of(power_PC)

    @property
    def _hop(self) -> int:
        return round(self.sample_rate * self.hop_ms / 1000)

    @property
    def _frames(self) -> int:
        return self.patch_frames or self.patch

    @property
    def _patch_samples(self) -> int:
        return self._hop * self._frames


def decode_audio(data: bytes, rate: int, most: int, *, key: str = "") -> Floats:
    """Decode the beginning of a sound to mono.

    Args:
        data: flac, wav, mp3, ogg, opus, m4a: whatever FFmpeg knows.
        rate: Hz of the result.
        most: samples that are enough.
        key: the sample's key, for the error.

    Returns:
        (N,) float32, 1 <= N <= most.

    Raises:
        SampleError: the bytes are no sound, or hold none.
    """
    parts: list[Floats] = []
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise SampleError(key, "undecodable", "the audio part has no sound")
            resampler, heard, resampled = av.AudioResampler(format="fltp", rate=rate), 0, False
            for frame in container.decode(container.streams.audio[0]):
                as_it_is = frame.sample_rate == rate and not resampled
                parts += [_samples(frame)] if as_it_is else [_samples(out) for out in resampler.resample(frame)]
                resampled = not as_it_is
                heard = sum(map(len, parts))
                if heard >= most:
                    break
            if heard < most and resampled:
                parts += [_samples(out) for out in resampler.resample(None)]
    except (av.FFmpegError, ValueError, EOFError) as e:
        raise SampleError(key, "undecodable", f"the audio does not decode ({' '.join(str(e).split())})") from e
    wave_N: Floats = np.concatenate(parts)[:most] if parts else np.empty(0, np.float32)
    if not len(wave_N):
        raise SampleError(key, "undecodable", "the audio has no samples")
    return wave_N


def _samples(frame: av.AudioFrame) -> Floats:
    """Mono samples in [-1, 1] of a frame of any format."""
    values = frame.to_ndarray()
    values_CN = values if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        values_CN = values_CN.astype(np.int16) - 128
    # FFmpeg's scales, powers of two; float32 before it, as FFmpeg has it
    scale = 1.0 if values.dtype.kind == "f" else 0.5 ** (8 * values.dtype.itemsize - 1)
    # the mean, as shards write takes it: FFmpeg's own mix of two equal channels is louder than either
    mono_N: Floats = (values_CN.astype(np.float32) * np.float32(scale)).mean(axis=0)
    return mono_N
