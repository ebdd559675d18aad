import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from shards.config import AudioConfig, ImageConfig, QuarantineConfig, VideoConfig, WriteConfig
from shards.errors import SampleError, SourceError
from shards.read import ShardReader
from shards.report import summary
from shards.sources.webdataset import WebDatasetSource
from shards.write import write_shards
from tests.shards.pictures import encoded, gradient
from tests.shards.recordings import clip, tone

IMAGE = encoded(gradient())


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(key: str, caption: str = "c") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", IMAGE), (f"{key}.txt", caption.encode())]


def source_of(path: Path) -> WebDatasetSource:
    return WebDatasetSource(WriteConfig(source="webdataset", path=str(path)))


def test_parts_become_image_captions_fields_and_extra(tmp_path: Path) -> None:
    members = [
        ("dir/a.b/0001.jpg", IMAGE),
        ("dir/a.b/0001.json", b'{"caption": "from json", "x": 1}'),
        ("dir/a.b/0001.cls", b"7\n"),
        ("dir/a.b/0001.seg.png", b"mask"),
        ("dir/a.b/0001.flac", b"sound"),
    ]
    source = source_of(write_tar(tmp_path / "a.tar", members))
    [record] = source.records()
    assert record.key == "dir__a-b__0001"
    raw = source.load(record)
    assert raw.image == IMAGE
    assert raw.captions == ["from json"]
    assert raw.fields == {"x": 1, "cls": 7}
    assert raw.audio == b"sound"
    assert raw.extra == {"seg.png": b"mask"}


def test_one_key_in_several_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*pair("0"), *pair("1")])
    write_tar(tmp_path / "b.tar", [*pair("0"), *pair("2")])
    assert [record.key for record in source_of(tmp_path).records()] == ["a-0", "1", "b-0", "2"]


def test_one_key_twice_in_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("0"), *pair("1"), *pair("0"), *pair("2"), ("2.jpg", IMAGE)])
    problems = [record.problem[0] if record.problem else None for record in source_of(path).records()]
    assert problems == ["duplicate_key", None, "duplicate_key", "duplicate_part"]


def test_two_images_in_a_sample(tmp_path: Path) -> None:
    source = source_of(write_tar(tmp_path / "a.tar", [*pair("0"), ("0.png", IMAGE)]))
    with pytest.raises(SampleError, match="0: duplicate_part: The sample has several images: jpg, png"):
        source.load(source.records()[0])


@pytest.mark.parametrize("cut", [600, 1500, 2560, 3000])
def test_cut_tar(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "a.tar", [*pair("0"), *pair("1")])
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[: end - cut])
    source = source_of(path)
    records = source.records()
    assert records[0].key == "0"
    assert source.load(records[0]).image == IMAGE
    assert any(record.problem and record.problem[0] == "broken_tar" for record in records)


def test_not_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(SourceError, match=r"hold no sample. z.tar is no uncompressed tar, or is cut short"):
        source_of(tmp_path / "z.tar").records()
    with pytest.raises(SourceError, match="hold no sample"):
        source_of(write_tar(tmp_path / "empty.tar", [])).records()
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match=r"holds no .tar file"):
        source_of(tmp_path / "none")


def test_audio_and_video_are_cleaned_as_images_are(tmp_path: Path) -> None:
    members = [("good.wav", tone(seconds=0.5, rate=8000)), ("good.mp4", clip(frames=10)), ("good.txt", b"a tone")]
    members += [("bad.flac", b"fLaC and nothing more"), ("bad.txt", b"no tone")]
    write_tar(tmp_path / "a.tar", members)
    audio, image = AudioConfig(sample_rate=4000, format="flac"), ImageConfig(required=False)
    out = tmp_path / "out"
    config = WriteConfig(source="webdataset", path=str(tmp_path / "a.tar"), out=str(out), processes=1)
    write_shards(replace(config, audio=audio, image=image, quarantine=QuarantineConfig(max_fraction=1)), progress=False)
    sample = ShardReader(out)[0, 0]
    assert set(sample.parts) == {"flac", "mp4", "txt", "json"}
    assert (sample.fields()["sample_rate"], sample.fields()["frames"]) == (4000, 10)
    assert "bad" in (out / "quarantine.jsonl").read_text()
    lines = summary(out)
    assert "audio     1 of 1   4,000 / 4,000.0 / 4,000 Hz" in lines
    assert "video     1 of 1   10 / 10.0 / 10 pictures" in lines
    assert "seconds, 0.0 min in all" in lines


def test_each_kind_has_its_own_size_limit(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.mp4", clip(frames=5)), ("k.jpg", IMAGE)])
    config = WriteConfig(source="webdataset", path=str(tmp_path / "a.tar"), video=VideoConfig(max_bytes=100))
    source = WebDatasetSource(config)
    with pytest.raises(SampleError, match=r"'mp4' has \d+ bytes; video\.max_bytes is 100"):
        source.load(source.records()[0])


def test_tars_of_one_name_in_several_folders(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "00000.tar", pair("0") + pair(folder))
    records = WebDatasetSource(WriteConfig(source="webdataset", path=f"{tmp_path}/*/00000.tar")).records()
    assert [record.key for record in records] == ["00000-00000-0", "a", "00001-00000-0", "b"]
    assert not any(record.problem for record in records)


def test_numbered_pictures_are_what_a_sample_shows(tmp_path: Path) -> None:
    """Clips and pairs of pictures as this project writes them."""
    write_tar(tmp_path / "a.tar", [("k.000.jpg", IMAGE), ("k.001.jpg", IMAGE), ("k.txt", b"c"), ("none.txt", b"c")])
    config = WriteConfig(
        source="webdataset", path=str(tmp_path / "a.tar"), out=str(tmp_path / "out"), quarantine=QuarantineConfig(max_fraction=1.0)
    )
    write_shards(config, progress=False)
    reader = ShardReader(tmp_path / "out")
    assert [reader[0, row].key for row in range(len(reader))] == ["k"]
    assert set(reader[0, 0].parts) == {"000.jpg", "001.jpg", "json", "txt"}
