import io

import numpy as np
import pytest
from PIL import Image

from shards.clean_video import check_video, clean_video
from shards.config import VideoConfig
from shards.errors import SampleError
from shards.media import media_facts
from shards.sample import Sample
from tests.shards.pictures import decoded, encoded, gradient
from tests.shards.recordings import clip, sound_only_mp4, tone, trimmed_clip, turned_clip

WHOLE = clip(60, kind="webm")
HALF = WHOLE[: len(WHOLE) // 2]


@pytest.mark.parametrize(("kind", "extension"), [("mp4", "mp4"), ("webm", "webm"), ("matroska", "mkv")])
def test_a_readable_file_is_kept(kind: str, extension: str) -> None:
    data = clip(30, kind=kind)
    clean = clean_video("k", data, VideoConfig())
    assert clean.parts == {extension: data}
    assert (clean.frames, clean.width, clean.height) == (30, 64, 48)
    assert clean.duration_s == pytest.approx(3.0, abs=0.11)
    assert clean.fps == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif"])
def test_pictures_at_even_distances(kind: str) -> None:
    clean = clean_video("k", clip(30, kind=kind), VideoConfig(mode="frames", frames=3, short_side=24, quality=95))
    assert list(clean.parts) == ["000.jpg", "001.jpg", "002.jpg"]
    assert (clean.frames, clean.width, clean.height) == (3, 32, 24)
    brightness = [decoded(data).mean() for data in clean.parts.values()]
    assert brightness == pytest.approx([8 * 5, 8 * 15, 8 * 25], abs=17)
    assert decoded(clean.parts["001.jpg"]).shape == (24, 32, 3)


def test_pictures_at_even_times() -> None:
    clean = clean_video("k", clip(30, rate=10), VideoConfig(mode="frames", fps=2))
    assert clean.frames == 6
    assert clean.fps == 2
    brightness = [decoded(data).mean() for data in clean.parts.values()]
    assert brightness == pytest.approx([8 * n for n in range(0, 30, 5)], abs=6)


def test_more_pictures_than_there_are() -> None:
    assert clean_video("k", clip(5), VideoConfig(mode="frames", frames=8)).frames == 5
    faster = clean_video("k", clip(5, rate=10), VideoConfig(mode="frames", fps=20))
    assert faster.frames == 10
    assert faster.parts["002.jpg"] == faster.parts["001.jpg"]


def test_a_gif_becomes_pictures_also_when_files_are_kept() -> None:
    assert list(clean_video("k", clip(4, kind="gif"), VideoConfig(frames=2)).parts) == ["000.jpg", "001.jpg"]


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (b"", VideoConfig(), "empty_file: The video has no bytes"),
        (b"no film at all" * 99, VideoConfig(), "not_a_video: The file of 1386 bytes is no video"),
        (tone(), VideoConfig(), "not_a_video: The wav file has sound, but no video stream"),
        (sound_only_mp4(), VideoConfig(), "not_a_video: .* has sound, but no video stream"),
        (clip(30)[:-800], VideoConfig(), "damaged_video: The mov.* file has neither pictures nor sound"),
        (HALF, VideoConfig(), "truncated: The video ends after"),
        (HALF, VideoConfig(mode="frames"), "truncated: The video ends after"),
        (clip(30), VideoConfig(max_seconds=2), r"video_too_long: The video lasts 3\.00 s; video\.max_seconds is 2"),
        (clip(30), VideoConfig(mode="frames", fps=1000), "too_many_frames: 3000 pictures are wanted"),
    ],
    ids=["empty", "text", "wav", "sound", "mp4", "webm", "webm-frames", "long", "many"],
)
def test_what_cannot_be_used(data: bytes, config: VideoConfig, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        clean_video("k", data, config)


def test_a_picture_is_a_video_of_one() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(clean_video("k", encoded(gradient(), "GIF"), VideoConfig()).parts["000.jpg"])))
    assert pixels.shape == (32, 48, 3)


@pytest.mark.parametrize(("degrees", "red"), [(90, np.s_[32:]), (-90, np.s_[:32]), (180, np.s_[:, 32:]), (0, np.s_[:, :32])])
def test_a_clip_is_shown_as_it_asks_to_be(degrees: int, red: tuple[slice, ...]) -> None:
    data = turned_clip(degrees)
    size = (48, 64) if degrees % 180 else (64, 48)
    for config in (VideoConfig(), VideoConfig(mode="frames", frames=1)):  # the latter last
        clean = clean_video("k", data, config)
        assert (clean.width, clean.height) == size
        facts = media_facts(Sample("k", clean.parts))
        assert (facts.width, facts.height) == size
    redness = decoded(clean.parts["000.jpg"])[..., 0]
    assert redness[red].mean() > 200
    assert 100 < redness.mean() < 150


def test_a_trimmed_clip_is_whole() -> None:
    data = trimmed_clip(40, 20)
    assert clean_video("k", data, VideoConfig()).parts == {"mp4": data}
    assert clean_video("k", data, VideoConfig(mode="frames", frames=4)).frames == 4
    check_video("k", data)
