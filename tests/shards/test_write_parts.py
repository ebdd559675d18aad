"""Data sets written by several commands, of several modalities, past a filter, onto disks that refuse."""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from shards import configfile
from shards.config import WriteConfig
from shards.errors import ConfigError, ShardError
from shards.index import index_tar, write_index
from shards.manifest import read_manifest
from shards.read import ShardReader
from shards.verify import verify
from shards.write import write_shards
from tests.shards.pictures import decoded, encoded, gradient, photo_folder
from tests.shards.recordings import clip, tone
from tests.shards.test_write import digests, quarantined, samples, write


def test_two_parts_are_the_whole(tmp_path: Path) -> None:
    words = ("source=glyphs", "glyphs.every=300", "rows_per_shard=20", "processes=1", "tokenizer.kind=bpe", "tokenizer.vocab_size=300")
    whole = write(*words, f"out={tmp_path / 'whole'}")
    first = write(*words, f"out={tmp_path / 'parts'}", "part=1/2")
    assert (first.digest, first.missing, first.shards) == (None, 4, 3)
    assert str(first).startswith("part 1/2: 60 samples in 3 shards, none quarantined; 4 shards of other parts are still missing in")
    assert not (tmp_path / "parts" / "manifest.parquet").exists()
    second = write(*words, f"out={tmp_path / 'parts'}", "part=2/2")
    assert (second.digest, second.written, second.shards) == (whole.digest, whole.written, whole.shards)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert write(*words, f"out={tmp_path / 'parts'}", "part=1/2").digest == whole.digest


def test_more_parts_than_shards(tmp_path: Path) -> None:
    words = ("source=glyphs", "glyphs.limit=10", "rows_per_shard=6", "processes=1", f"out={tmp_path / 'out'}")
    summaries = [write(*words, f"part={number}/5") for number in range(1, 6)]
    assert [summary.shards for summary in summaries[:4]] == [0, 0, 1, 0]
    assert summaries[4].digest is not None


def test_parts_must_have_one_plan(tmp_path: Path) -> None:
    words = ("source=glyphs", "glyphs.limit=10", "rows_per_shard=6", "processes=1", f"out={tmp_path / 'out'}")
    write(*words, "part=1/2")
    with pytest.raises(ConfigError, match=r"was begun with another plan: glyphs\.limit was 10, is 12"):
        write(*words, "part=2/2", "glyphs.limit=12")


def test_the_whole_takes_over_what_a_dead_part_has_left(tmp_path: Path) -> None:
    words = ("source=glyphs", "glyphs.limit=10", "rows_per_shard=3", "processes=1", f"out={tmp_path / 'out'}")
    write(*words, "part=1/2")
    (tmp_path / "out" / ".claims").mkdir()
    claim = tmp_path / "out" / ".claims" / "shard-000002.tar"
    claim.write_text("elsewhere_1-7-00000000")
    os.utime(claim, (0, 0))
    assert write(*words, "part=all").shards == 4
    assert not list((tmp_path / "out").rglob(".*"))


def test_progress_says_which_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["source=glyphs", "glyphs.limit=10", "rows_per_shard=2", "processes=1", f"out={tmp_path / 'out'}", "part=2/2"]
    write_shards(configfile.load(WriteConfig, None, words))
    assert "part 2/2: 3 of 5 shards, 2 to 4" in capsys.readouterr().err


def test_a_filter_leaves_out_and_does_not_quarantine(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "in", 6)
    (folder / "photo1.jpg").write_bytes(encoded(gradient(200, 20)))
    (folder / "photo2.jpg").write_bytes(encoded(gradient(12, 12)))
    (folder / "photo3.txt").write_text("x")
    (folder / "photo4.txt").write_text("An AD for shoes")
    limits = ["filter.min_side=16", "filter.max_aspect=4", "filter.min_chars=2", "filter.deny=[ad]", "quarantine.max_count=0"]
    out = tmp_path / "out"
    summary = write("source=folder", f"path={folder}", f"out={out}", "processes=1", "rows_per_shard=4", *limits)
    assert set(samples(out)) == {"photo0", "photo5"}
    assert summary.filtered == {"max_aspect": 1, "min_side": 1, "min_chars": 1, "deny": 1}
    assert summary.quarantined == {}
    assert "none quarantined, 4 filtered (1 deny, 1 max_aspect, 1 min_chars, 1 min_side)" in str(summary)
    lines = [json.loads(line) for line in (out / "filtered.jsonl").read_text().splitlines()]
    assert lines[0] == {"key": "photo1", "reason": "max_aspect", "source": "photo1.jpg"}
    assert write("source=folder", f"path={folder}", f"out={out}", "processes=1", "rows_per_shard=4", *limits).filtered == summary.filtered


def test_several_sizes(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "in", 1)
    (folder / "large.jpg").write_bytes(encoded(gradient(300, 200), quality=95))
    (folder / "large.txt").write_text("large")
    write("source=folder", f"path={folder}", f"out={tmp_path / 'out'}", "image.sizes=[100,25,50]", "processes=1")
    found = samples(tmp_path / "out")
    assert {name: decoded(data).shape for name, data in found["large"].items() if name.endswith("jpg")} == {
        "jpg": (100, 150, 3),
        "50.jpg": (50, 75, 3),
        "25.jpg": (25, 38, 3),
    }
    assert found["photo0"]["jpg"] == found["photo0"]["50.jpg"] == (folder / "photo0.jpg").read_bytes()
    reader = ShardReader(tmp_path / "out")
    image = reader[0, 0].image()
    assert image is not None
    assert image[0] == "jpg"
    assert decoded(image[1]).shape == (100, 150, 3)
    assert not verify(tmp_path / "out", full=True).faults


def test_a_caption_a_line(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "in", 2)
    (folder / "photo0.txt").write_text("one\n\n two \r\nthree\none\n")
    write("source=folder", f"path={folder}", f"out={tmp_path / 'out'}", "caption.one_a_line=true", "processes=1")
    found = samples(tmp_path / "out")
    assert json.loads(found["photo0"]["json"])["captions"] == ["one", "two", "three"]
    assert found["photo1"]["txt"] == b"photo number 1"


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Recordings and films with captions, one pair of both, one of each kind that is broken."""
    folder = tmp_path / "media"
    folder.mkdir()
    files = {
        "bark.wav": tone(1.5, 22050, 2),
        "rain.ogg": tone(0.5, kind="OGG"),
        "film.mp4": clip(20),
        "both.mp4": clip(10),
        "both.flac": tone(1.0, kind="FLAC"),
        "cut.wav": tone(1.0)[:-5000],
        "text.mp4": b"no film" * 50,
        "silent.wav": tone(0.0),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"sound or sight of {name}")
    return folder


@pytest.mark.parametrize("mode", ["keep", "frames"])
def test_audio_and_video_from_a_folder(media: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "out"
    words = ["audio.sample_rate=16000", "audio.channels=mono", f"video.mode={mode}", "video.frames=4", "video.short_side=24"]
    write("source=folder", f"path={media}", f"out={out}", "processes=1", "quarantine.max_fraction=0.5", *words)
    assert {line["key"]: line["reason"] for line in quarantined(out)} == {
        "cut": "truncated",
        "text": "not_a_video",
        "silent": "no_samples",
    }
    found = samples(out)
    pictures = {"mp4"} if mode == "keep" else {"000.jpg", "001.jpg", "002.jpg", "003.jpg"}
    assert {key: set(parts) - {"txt", "json"} for key, parts in found.items()} == {
        "bark": {"wav"},
        "rain": {"ogg"},
        "film": pictures,
        "both": pictures | {"flac"},
    }
    assert soundfile.info(io.BytesIO(found["bark"]["wav"])).samplerate == 16000
    bark, film = (json.loads(found[key]["json"]) for key in ("bark", "film"))
    assert (bark["duration_s"], bark["sample_rate"], bark["channels"]) == (1.5, 16000, 1)
    assert (film["duration_s"], film["frames"], film["fps"]) == ((2.0, 20, 10.0) if mode == "keep" else (2.0, 4, 2.0))
    [shard] = read_manifest(out).shards
    assert (shard.duration_s_min, shard.duration_s_max, shard.sample_rate_mean) == (0.5, 2.0, 16000.0)
    assert shard.frames_max == (20 if mode == "keep" else 4)
    sidecar = out / "shard-000000.index.arrow"
    before = sidecar.read_bytes()
    write_index(sidecar, index_tar(out / "shard-000000.tar"))
    assert sidecar.read_bytes() == before
    assert pq.read_table(out / "manifest.parquet").column("duration_s_mean").to_pylist() == [shard.duration_s_mean]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_audio_and_video_from_a_table(media: Path, tmp_path: Path, kind: str) -> None:
    rows = [{"sound": "rain.ogg", "film": "film.mp4", "name": "a"}, {"sound": "bark.wav", "film": None, "name": "b"}]
    rows += [{"sound": None, "film": None, "name": "nothing"}]
    if kind == "parquet":
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(rows), media / "t.parquet")
    else:
        (media / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["columns.image=null", "columns.audio=sound", "columns.video=film", "columns.caption=name"]
    write("source=table", f"path={media / f't.{kind}'}", f"out={tmp_path / 'out'}", *columns, "processes=1", "quarantine.max_fraction=0.5")
    found = samples(tmp_path / "out")
    assert {key: set(parts) for key, parts in found.items()} == {"rain": {"ogg", "mp4", "txt", "json"}, "bark": {"wav", "txt", "json"}}
    assert quarantined(tmp_path / "out")[0]["reason"] == "no_image"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 40 kB: writing on fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more(tmp_path: Path, small_files: None) -> None:
    words = ("source=glyphs", "glyphs.every=100", "processes=1", "rows_per_shard=50", f"out={tmp_path / 'out'}")
    with pytest.raises(ShardError, match=r"Writing the shard 'shard-000000.tar' in .* failed: File too large. Mend that and repeat"):
        write(*words)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write(*words)
    write(*words[:-1], f"out={tmp_path / 'other'}")
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


@pytest.mark.cluster
def test_a_full_disk(tmp_path: Path) -> None:
    """A file system of 2 MB: the error names the shard, nothing half-written stays, more room is all that is needed."""
    mount = tmp_path / "mount"
    mount.mkdir()
    words = ("source=glyphs", "glyphs.every=15", "processes=2", "rows_per_shard=200")
    write(*words, f"out={tmp_path / 'whole'}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], check=True)
    try:
        with pytest.raises(ShardError, match=r"failed: No space left on device\. Mend that and repeat"):
            write(*words, f"out={mount / 'out'}")
        finished = sorted(path.name for path in (mount / "out").glob("*.index.arrow"))
        assert 0 < len(finished) < 14
        assert not list((mount / "out").rglob(".*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        write(*words, f"out={mount / 'out'}")
        assert digests(mount / "out") == digests(tmp_path / "whole")
        assert not list((mount / "out").rglob(".*"))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.cluster
def test_a_folder_that_may_only_be_read(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)], check=True)
    try:
        with pytest.raises(ShardError, match=r"Writing in .* failed: Read-only file system"):
            write("source=glyphs", "glyphs.limit=3", f"out={mount}")
        with pytest.raises(ConfigError, match="cannot be made: Read-only file system"):
            write("source=glyphs", "glyphs.limit=3", f"out={mount / 'out'}")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


AS_NOBODY = """
import os, sys
from shards import configfile
from shards.config import WriteConfig
from shards.errors import MmscaleError
from shards.write import write_shards
os.setgid(65534)
os.setuid(65534)
try:
    write_shards(configfile.load(WriteConfig, None, ["source=folder", "processes=1", *sys.argv[1:]]), progress=False)
except MmscaleError as e:
    print(type(e).__name__, e)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_permissions() -> None:
    """As a user without rights: one paragraph each."""
    with tempfile.TemporaryDirectory() as name:  # the folders of pytest keep others out
        place = Path(name)
        place.chmod(0o755)
        photo_folder(place / "in", 2)
        (place / "out").mkdir(mode=0o755)
        command = [sys.executable, "-c", AS_NOBODY, f"path={place / 'in'}", f"out={place / 'out'}"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"ShardError Writing in '{place / 'out'}' failed: Permission denied. Mend that and repeat")
        assert not list((place / "out").iterdir())
        (place / "out").chmod(0o777)
        (place / "in").chmod(0o700)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"SourceError The folder '{place / 'in'}' cannot be listed: Permission denied")
