"""Samples to patches: sizes under a budget, spectrograms as a reference computes them, frames of clips, sound of every container."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from mmscale.config import find_part, load_run_config
from mmscale.modalities.audio import Audio, decode_audio
from mmscale.modalities.image import NativeImage
from mmscale.modalities.mel import log_mel
from mmscale.modalities.modality import Change, build_modalities
from mmscale.modalities.pixels import fitted_size
from mmscale.modalities.video import Video
from mmscale.model.embeddings import patchify
from mmscale.model_config import ImageTowerConfig, ModelConfig, TextTowerConfig
from shards.errors import ConfigError, SampleError
from shards.sample import Sample
from tests.shards.recordings import clip, sound_only_mp4, tone, turned_clip


def read(modality, parts):
    out = np.empty((modality.max_patches, modality.values), modality.dtype)
    grid = modality.read(Sample("k", parts), out, Change())
    return grid, None if grid is None else out[: math.prod(grid)]


def picture(height: int, width: int, kind: str = "PNG", shade: int | None = None) -> bytes:
    stream, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise if shade is None else np.full_like(noise, shade)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (64, 64), (20, 3000), (3000, 20), (1, 1), (999, 1000)])
def test_a_picture_fits_the_budget_and_keeps_its_shape(height: int, width: int) -> None:
    h, w = fitted_size(height, width, 16, 100)
    assert h % 16 == w % 16 == 0
    assert 1 <= (h // 16) * (w // 16) <= 100
    if height * width > 100 * 256 and min(h, w) > 16:
        assert (h // 16) * (w // 16) > 80  # the budget is used
        assert abs(math.log((h / w) / (height / width))) < 0.2
    elif height * width <= 100 * 256:
        assert (h, w) == (max(1, round(height / 16)) * 16, max(1, round(width / 16)) * 16)


def test_patches_of_a_native_image_are_those_of_its_pixels() -> None:
    import torch

    modality = NativeImage(max_tokens=24, patch_size=8, image_size=16)
    grid, values = read(modality, {"png": picture(32, 48)})
    assert grid == (1, 4, 6)
    pixels = np.asarray(Image.open(io.BytesIO(picture(32, 48))))
    expected = patchify(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], 8)[0]
    assert np.array_equal(values, expected.numpy())
    assert read(modality, {"jpg": picture(300, 100, "JPEG")})[0] == (1, 8, 3)
    assert read(modality, {"txt": b"none"}) == (None, None)
    with pytest.raises(SampleError, match="undecodable"):
        read(modality, {"jpg": picture(300, 100, "JPEG")[:50]})


def test_log_mel_is_whispers() -> None:
    time = np.arange(16000) / 16000
    noise, chirp = np.random.default_rng(0).normal(size=16000) * 0.1, np.sin(2 * np.pi * (50 + 3000 * time) * time)
    extractor = WhisperFeatureExtractor(feature_size=80)
    for wave, near in ((noise, 1e-5), (chirp, 1e-4)):
        expected = extractor._np_extract_fbank_features(wave[None].astype(np.float32), "cpu")[0]
        got = log_mel(wave.astype(np.float32), rate=16000, bands=80, window=400, hop=160, scale="slaney")
        np.testing.assert_allclose(got, np.asarray(expected).T, atol=near)


@pytest.mark.parametrize(("scale", "norm"), [("htk", None), ("slaney", "slaney")])
def test_the_mel_scales_are_the_reference_implementations(scale: str, norm: str | None) -> None:
    wave = np.random.default_rng(1).normal(size=8000)
    filters = mel_filter_bank(201, 64, 0.0, 8000.0, 16000, norm=norm, mel_scale=scale)
    power = spectrogram(wave, window_function(400, "hann"), 400, 160, power=2.0, mel_filters=filters, mel_floor=1e-10, log_mel="log10")[
        :, :-1
    ]
    expected = (np.maximum(power, power.max() - 8.0) + 4.0) / 4.0
    got = log_mel(wave.astype(np.float32), rate=16000, bands=64, window=400, hop=160, scale=scale)
    np.testing.assert_allclose(got, expected.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3"])
def test_sound_of_any_container_is_resampled_mono(kind: str) -> None:
    wave = decode_audio(tone(1.0, rate=22050, channels=2, kind=kind), 16000, 16000)
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(16000, abs=1200)  # mp3 frames are padded
    inner = wave[4000:12000]
    assert np.sqrt((inner**2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
    assert np.argmax(np.abs(np.fft.rfft(inner))) * 2 == pytest.approx(440, abs=2)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_sound_at_its_own_rate_keeps_every_bit(subtype: str, channels: int) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, np.random.default_rng(0).uniform(-1, 1, (30000, channels)), 16000, format="WAV", subtype=subtype)
    written, _ = soundfile.read(io.BytesIO(stream.getvalue()), dtype="float32", always_2d=True)
    wave = decode_audio(stream.getvalue(), 16000, 20000)
    assert wave.dtype == np.float32
    assert np.array_equal(wave, written[:20000].mean(axis=1))
    assert len(decode_audio(stream.getvalue(), 16000, 40000)) == 30000


def test_sound_is_cut_along_time_then_bands() -> None:
    modality = Audio(max_seconds=0.5, mels=32, patch=8)
    grid, values = read(modality, {"wav": tone(0.2, rate=16000)})
    assert grid == (3, 4, 1)  # 3200 samples, 1280 a patch
    wave = np.pad(decode_audio(tone(0.2, rate=16000), 16000, 8000), (0, 640))
    heard = log_mel(wave, rate=16000, bands=32, window=400, hop=160, scale="slaney")
    assert np.array_equal(values[4 * 1 + 2].reshape(8, 8), heard[8:16, 16:24].T)
    assert read(modality, {"wav": tone(2.0)})[0] == modality.grid == (7, 4, 1)


def test_patches_may_be_whole_spectra() -> None:
    modality = Audio(max_seconds=0.5, mels=32, patch=32, patch_frames=2)
    grid, values = read(modality, {"wav": tone(0.2, rate=16000)})
    assert grid == (10, 1, 1)  # 3200 samples, 320 a patch
    heard = log_mel(decode_audio(tone(0.2, rate=16000), 16000, 8000), rate=16000, bands=32, window=400, hop=160, scale="slaney")
    assert np.array_equal(values[3].reshape(32, 2), heard[6:8].T)
    assert (modality.values, modality.grid) == (64, (25, 1, 1))
    with pytest.raises(ConfigError, match=r"`model\.modalities\.audio\.patch_frames` must be above 0; got 0\."):
        Audio(patch_frames=0).check("model.modalities.audio")


@pytest.mark.parametrize("data", [b"", b"RIFFgarbage" * 9, sound_only_mp4()[:40]])
def test_what_is_no_sound_is_a_sample_error(data: bytes) -> None:
    with pytest.raises(SampleError, match="undecodable"):
        read(Audio(), {"wav": data})


@pytest.mark.parametrize(("frames", "stride", "expected"), [(30, None, [3, 11, 18, 26]), (3, None, [0, 1, 2, 2]), (30, 2, [0, 2, 4, 6])])
def test_chosen_frames(frames: int, stride: int | None, expected: list[int]) -> None:
    assert Video(frames=4, stride=stride).chosen(frames) == expected


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_tubelets_of_a_clip_are_its_frames(kind: str) -> None:
    modality = Video(frames=4, tubelet=2, image_size=16, patch_size=8)
    parts = {kind: clip(frames=12, kind=kind)}
    grid, values = read(modality, parts)
    assert grid == (2, 2, 2)
    shades = values.reshape(2, 4, 3, 2, 64).mean((1, 2, 4))  # (tubelet, frame)
    np.testing.assert_allclose(shades.flatten(), [8 * i for i in (1, 4, 7, 10)], atol=4)
    short, _ = read(modality, {kind: clip(frames=1, kind=kind)})
    assert short == (1, 2, 2)


def test_numbered_pictures_are_a_clip_and_sound_alone_is_none() -> None:
    modality = Video(frames=2, tubelet=1, image_size=16, patch_size=8)
    assert read(modality, {"000.png": picture(16, 16), "001.png": picture(20, 16)})[0] == (2, 2, 2)
    with pytest.raises(SampleError, match="no pictures"):
        read(modality, {"mp4": sound_only_mp4()})


def test_numbered_pictures_come_in_the_order_of_their_numbers() -> None:
    """Also without leading zeros, as others write them."""
    modality = Video(frames=12, tubelet=1, image_size=16, patch_size=8)
    parts = {f"{i}.png": picture(16, 16, shade=20 * i) for i in range(12)}
    grid, values = read(modality, dict(sorted(parts.items())))
    assert grid == (12, 2, 2)
    np.testing.assert_allclose(values.reshape(12, -1).mean(1), [20 * i for i in range(12)], atol=1)


def test_keys_that_are_null_are_the_models_and_parts_have_names(tmp_path) -> None:
    (tmp_path / "stage.yaml").write_text("run: r\ndata: {shards: s}\nobjectives: {captioning: {weight: 1}}\n")
    words = ["model.modalities.audio=audio", "model.modalities.audio.mels=64", "model.modalities.video.frames=4", "model.patch_size=16"]
    config = load_run_config(tmp_path / "stage.yaml", words)
    built = build_modalities(config.model)
    assert list(built) == ["video", "audio"]  # the order of a sample's items
    assert built["audio"].mels == 64
    assert (built["video"].patch_size, built["video"].image_size, built["video"].image_mean) == (16, 32, (0.5, 0.5, 0.5))
    for name in ("image", "audio", "video"):
        assert find_part("modality", name).is_file()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sound": {}}, r"`model\.modalities\.sound\.kind` must be image, audio, video or `package\.module:Class`; got 'sound'"),
        ({"audio": {"melts": 3}}, r"Key 'melts' not in 'Audio'.*\(in model\.modalities\.audio\)"),
        ({"audio": {"mels": 100}}, r"`model\.modalities\.audio\.patch` must divide mels = 100; got 16"),
        ({"video": {"frames": 3}}, r"`model\.modalities\.video\.tubelet` must divide frames = 3; got 2"),
        ({"photo": {"kind": "image"}}, r"`image` is the kind of the entry `image` and of no other"),
        ({"audio": {"expert": "text"}}, r"`model\.modalities\.audio\.expert` must be `perception` or a word"),
        ({"x": {"kind": "nowhere:Thing"}}, r"'nowhere:Thing' cannot be imported"),
        ({"x": {"kind": "pathlib:Path"}}, r"is no subclass of mmscale\.modalities\.modality\.Modality"),
        (
            {"x": {"kind": "mmscale.modalities.modality:Modality"}},
            r"`model\.modalities\.x\.kind`: 'mmscale\.modalities\.modality:Modality' does not define values, grid, read\.",
        ),
        ({"audio": 3}, r"`model\.modalities\.audio` must be a mapping"),
    ],
)
def test_wrong_entries_are_named(entry: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(modalities=entry).check()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"modalities": {"audio": {}}, "image": {"pooling": "attention", "leading_tokens": 0}},
            r"Set model\.image\.pooling=cls and model\.image",
        ),
        (
            {"modalities": {"image": {}}, "image": {"leading_tokens": 2}},
            r"have one \[CLS\] and no norm.*leave model\.modalities\.image out",
        ),
        (
            {"modalities": {"image": {}}, "image": {"embedding_norm": True}},
            r"Set model\.image\.leading_tokens=1 and model\.image\.embedding_norm",
        ),
        (
            {"modalities": {"image": {"image_size": 64}}, "init_image_from": "x"},
            r"starts images of model\.image_size; .* Leave image_size out there",
        ),
        ({"positions": "rotary", "init_text_from": "x"}, r"are checkpoints with learned positions\. Set model\.positions to learned"),
        (
            {"positions": "rotary", "text": {"hidden_size": 36, "num_heads": 4}},
            r"needs heads of an even width of at least 6.*that of model\.text is 9",
        ),
        ({"positions": "rotary", "num_heads": 32}, r"hidden_size / num_heads is 4"),
        ({"positions": "rotary", "rotary_base": 1.0}, r"`model\.rotary_base` must be above 1; got 1\.0"),
    ],
)
def test_towers_that_do_not_go_with_modalities_or_positions_are_refused(keys: dict, message: str) -> None:
    towers = {name: kind(**keys.pop(name)) for name, kind in (("text", TextTowerConfig), ("image", ImageTowerConfig)) if name in keys}
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig(**keys, **towers).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"modalities": {"audio": {}}, "image": ImageTowerConfig(leading_tokens=2, embedding_norm=True)},
        {"modalities": {"image": {}}, "init_image_from": "x"},
        {"positions": "rotary", "text": TextTowerConfig(hidden_size=64, num_heads=2, norm="post")},
        {"positions": "rotary", "image": ImageTowerConfig(pooling="attention", leading_tokens=0)},
    ],
)
def test_towers_that_do_go_with_them_are_not(keys: dict) -> None:
    ModelConfig(**keys).check()


@pytest.mark.parametrize(("degrees", "red"), [(90, np.s_[16:]), (-90, np.s_[:16]), (180, np.s_[:, 16:]), (0, np.s_[:, :16])])
def test_a_turned_clip_is_seen_upright(degrees: int, red: tuple[slice, ...]) -> None:
    video = Video(frames=2, tubelet=1, patch_size=32, image_size=32)
    _, patches = read(video, {"mp4": turned_clip(degrees)})
    redness = patches[0].reshape(3, 32, 32)[0]
    assert redness[red].mean() > 200
    assert 100 < redness.mean() < 150


def test_an_image_in_other_sizes_is_no_clip() -> None:
    assert read(Video(frames=2, patch_size=16, image_size=32), {"jpg": picture(20, 20), "256.jpg": picture(16, 16)})[0] is None
