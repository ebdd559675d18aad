import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from shards.clean_audio import clean_audio
from shards.config import AudioConfig
from shards.errors import SampleError
from tests.shards.recordings import clip, tone

ESC10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "esc10"


def loudest_hertz(data: bytes) -> float:
    samples, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    spectrum = np.abs(np.fft.rfft(samples[:, 0]))
    return float(spectrum.argmax() * rate / len(samples))


@pytest.mark.parametrize(("kind", "extension"), [("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg"), ("MP3", "mp3")])
def test_bytes_stay_when_nothing_needs_change(kind: str, extension: str) -> None:
    data = tone(kind=kind)
    clean = clean_audio("k", data, AudioConfig(sample_rate=16000, channels="mono", max_seconds=2))
    assert (clean.extension, clean.data, clean.sample_rate, clean.channels) == (extension, data, 16000, 1)
    assert clean.duration_s == pytest.approx(1.0, abs=0.1)


def test_another_rate_one_channel_another_format() -> None:
    clean = clean_audio("k", tone(rate=44100, channels=2), AudioConfig(sample_rate=16000, channels="mono", format="flac"))
    info = soundfile.info(io.BytesIO(clean.data))
    assert (clean.extension, info.format, info.subtype, info.samplerate, info.channels) == ("flac", "FLAC", "PCM_16", 16000, 1)
    assert (info.frames, clean.duration_s) == (16000, 1.0)
    assert loudest_hertz(clean.data) == pytest.approx(440, abs=1)
    assert np.abs(soundfile.read(io.BytesIO(clean.data))[0]).max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_long_recordings_are_cut_or_refused(kind: str) -> None:
    data = tone(3.0, kind=kind)
    cut = clean_audio("k", data, AudioConfig(max_seconds=0.5))
    assert cut.duration_s == 0.5
    assert soundfile.info(io.BytesIO(cut.data)).frames == 8000
    assert cut.extension == ("wav" if kind == "WAV" else "flac")
    with pytest.raises(SampleError, match=r"k: audio_too_long: The audio lasts 3\.00 s; audio\.max_seconds is 0\.5"):
        clean_audio("k", data, AudioConfig(max_seconds=0.5, too_long="quarantine"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty_file: The audio has no bytes"),
        (b"no sound at all" * 40, "not_audio: The audio .* does not decode"),
        (clip(3), "not_audio"),
        (tone(0.0), "no_samples: The audio has no samples"),
        (tone(1.0)[:-9000], r"truncated: The header of the wav promises 32044 bytes, the file has 23044"),
        (tone(1.0, kind="FLAC")[:-3000], "truncated"),
        (tone(1.0, kind="OGG")[:2000], "truncated|no_samples"),
        (tone(1.0, kind="FLAC")[:20], "truncated"),
    ],
    ids=["empty", "text", "video", "silent", "wav", "flac", "ogg", "header"],
)
def test_what_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        clean_audio("k", data, AudioConfig())


def test_a_wav_that_was_written_to_a_pipe() -> None:
    data = bytearray(tone())
    data[4:8] = b"\xff\xff\xff\xff"
    assert clean_audio("k", bytes(data), AudioConfig()).duration_s == 1.0


@pytest.mark.skipif(not ESC10.is_dir(), reason="the ESC-10 set is not beside the repository")
def test_real_recordings() -> None:
    files = sorted(ESC10.glob("*/*.ogg"))[::40]
    assert files
    for file in files:
        kept = clean_audio("k", file.read_bytes(), AudioConfig())
        assert kept.data == file.read_bytes()
        assert kept.sample_rate == 44100
        assert 1 < kept.duration_s < 10
        small = clean_audio("k", file.read_bytes(), AudioConfig(sample_rate=16000, channels="mono", max_seconds=2))
        assert soundfile.info(io.BytesIO(small.data)).frames == 32000
