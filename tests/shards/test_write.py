import gc
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.errors import BudgetError, ConfigError, SourceError
from shards.index import index_tar
from shards.manifest import read_manifest
from shards.read import ShardReader
from shards.sidecar import write_index
from shards.tar import TarStream
from shards.verify import verify
from shards.write import WriteSummary, write_shards
from tests.shards.pictures import (
    bomb,
    decoded,
    encoded,
    gradient,
    palette_png,
    photo_folder,
    rotated_photo,
    wide_png,
)

EMOJI = Path(__file__).resolve().parents[3] / "shared" / "data" / "emojitwo"


def write(*words: str) -> WriteSummary:
    return write_shards(configfile.load(WriteConfig, None, words), progress=False)


def digests(folder: Path) -> dict[str, str]:
    """Every file but hidden ones, by its path inside the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    reader = ShardReader(out)
    counts = read_manifest(out).rows_per_shard
    read = [reader[shard, row] for shard, rows in enumerate(counts) for row in range(rows)]
    return {sample.key: dict(sample.parts) for sample in read}


def quarantined(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """A folder of eight good pairs, three odd ones that can be saved, and one of each hopeless kind."""
    folder = photo_folder(tmp_path / "nasty", 8)
    files = {
        "cmyk.jpg": encoded(gradient().convert("CMYK")),
        "wide.png": wide_png(),
        "palette.png": palette_png(),
        "rotated.jpg": rotated_photo(),
        "truncated.jpg": encoded(gradient(200, 200))[:-500],
        "empty.jpg": b"",
        "bomb.png": bomb(),
        "latin.jpg": encoded(gradient()),
        "blank.jpg": encoded(gradient()),
        "two.jpg": encoded(gradient()),
        "two.png": encoded(gradient(), "PNG"),
        "endless.jpg": encoded(gradient()),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "blank.txt").write_text(" \n")
    (folder / "endless.txt").write_text("long " * 200_000)
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(encoded(gradient()))
    (folder / "link.jpg").symlink_to(outside)
    (folder / "link.txt").write_text("link out of the folder")
    return folder


def test_a_folder_of_everything_that_can_be_wrong(nasty: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = write("source=folder", f"path={nasty}", f"out={out}", "quarantine.max_fraction=0.5", "rows_per_shard=5", "processes=2")
    expected = {
        "truncated": "truncated",
        "empty": "empty_file",
        "bomb": "too_many_pixels",
        "latin": "bad_encoding",
        "blank": "empty_caption",
        "two": "duplicate_key",
        "endless": "caption_too_long",
        "link": "outside_folder",
    }
    assert {line["key"]: line["reason"] for line in quarantined(out)} == expected
    assert sorted(line["source"] for line in quarantined(out) if line["key"] == "two") == ["two.jpg", "two.png"]
    assert all(line["detail"] for line in quarantined(out))
    assert summary.quarantined == Counter([*expected.values(), "duplicate_key"])
    assert summary.written == 12
    found = samples(out)
    assert set(found) == {f"photo{n}" for n in range(8)} | {"cmyk", "wide", "palette", "rotated"}
    assert found["photo3"]["jpg"] == (nasty / "photo3.jpg").read_bytes()
    assert found["photo3"]["txt"] == b"photo number 3"
    assert decoded(found["rotated"]["jpg"]).shape == (48, 32, 3)
    assert (decoded(found["palette"]["png"])[:, :20] == 255).all()
    assert decoded(found["wide"]["png"])[-1, -1, 0] == 255
    assert json.loads(found["cmyk"]["json"])["sha256"] == hashlib.sha256((nasty / "cmyk.jpg").read_bytes()).hexdigest()
    assert not verify(out, full=True).faults
    assert "12 samples in 5 shards, 9 quarantined (2 duplicate_key, 1 bad_encoding" in str(summary)


def test_latin_1_is_converted_on_request(nasty: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write("source=folder", f"path={nasty}", f"out={out}", "quarantine.max_fraction=0.5", "caption.fallback_encoding=latin-1", "processes=1")
    assert samples(out)["latin"]["txt"].decode() == "café"


@pytest.mark.parametrize("limit", ["quarantine.max_fraction=0.2", "quarantine.max_count=8"])
def test_past_the_budget_the_good_ones_are_written_all_the_same(nasty: Path, tmp_path: Path, limit: str) -> None:
    words = ("source=folder", f"path={nasty}", f"out={tmp_path / 'out'}", "processes=1")
    message = rf"9 of 21 samples were quarantined \(2 duplicate_key, .*\), more than {limit} allows. The other 12 are written in"
    with pytest.raises(BudgetError, match=message):
        write(*words, "quarantine.max_fraction=0.9", limit)
    assert len(samples(tmp_path / "out")) == 12
    assert write(*words, "quarantine.max_fraction=0.9").quarantined.total() == 9  # the same shards, a larger budget


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    photo_folder(tmp_path, 3)
    (tmp_path / "pairs.csv").write_text("file,name\nphoto0.jpg,a\nnone.jpg,b\nphoto2.jpg,c\n")
    out = tmp_path / "out"
    words = ["source=table", f"path={tmp_path / 'pairs.csv'}", f"out={out}", "columns.image=file", "columns.caption=name"]
    summary = write(*words, "quarantine.max_count=1", "quarantine.max_fraction=1")
    assert summary.quarantined == {"missing_file": 1}
    assert [(line["key"], line["source"]) for line in quarantined(out)] == [("none", "pairs.csv:3")]
    assert set(samples(out)) == {"photo0", "photo2"}


def test_nothing_good_at_all(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    said = r"1 of 1 samples were quarantined .* The first is 'a' of a\.jpg: There is no caption; .* Read quarantine\.jsonl there for all;"
    with pytest.raises(BudgetError, match=said):
        write("source=folder", f"path={tmp_path / 'in'}", f"out={tmp_path / 'out'}")
    assert read_manifest(tmp_path / "out").rows == 0


@pytest.mark.parametrize("kind", ["glyphs", "folder"])
def test_same_bytes_for_one_and_two_processes(nasty: Path, tmp_path: Path, kind: str) -> None:
    given = {
        "glyphs": ["source=glyphs", "glyphs.every=100", "rows_per_shard=100"],
        "folder": ["source=folder", f"path={nasty}", "rows_per_shard=3", "image.short_side=20", "quarantine.max_fraction=1"],
    }[kind]
    for processes in (1, 2):
        words = [f"out={tmp_path / str(processes)}", f"processes={processes}", "tokenizer.kind=wordpiece", "tokenizer.vocab_size=300"]
        write(*given, *words)
    first = digests(tmp_path / "1")
    assert first == digests(tmp_path / "2")
    assert {"manifest.parquet", "tokenizer/tokenizer.json", "shard-000003.tar", "shard-000003.index.arrow"} <= set(first)


def test_written_sidecar_is_what_indexing_the_tar_gives(nasty: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write("source=folder", f"path={nasty}", f"out={out}", "quarantine.max_fraction=1", "processes=1")
    sidecar = out / "shard-000000.index.arrow"
    before = sidecar.read_bytes()
    write_index(sidecar, index_tar(out / "shard-000000.tar"))
    assert sidecar.read_bytes() == before


def test_tar_is_the_one_that_webdatasets_writer_makes() -> None:
    webdataset = pytest.importorskip("webdataset")
    ours, theirs = io.BytesIO(), io.BytesIO()
    stream = TarStream(ours)
    with webdataset.TarWriter(theirs, encoder=False, mtime=0) as writer:
        for number, size in enumerate([0, 1, 511, 512, 513, 10_240]):
            parts = {"jpg": bytes(size), "json": b"{}", "txt": "é".encode()}
            writer.write({"__key__": f"key{number}", **parts})
            for extension, data in parts.items():
                offset = stream.add(f"key{number}.{extension}", data)
                assert ours.getvalue()[offset : offset + len(data)] == data
    digest = stream.close()
    assert ours.getvalue() == theirs.getvalue()
    assert digest == hashlib.sha256(theirs.getvalue()).hexdigest()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's reader leaves its files to the collector
def test_webdataset_reads_ours_and_we_convert_theirs(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    photo_folder(tmp_path / "in", 5)
    (tmp_path / "in" / "photo4.jpg").rename(tmp_path / "in" / "zoé.jpg")
    (tmp_path / "in" / "photo4.txt").rename(tmp_path / "in" / "zoé.txt")
    write("source=folder", f"path={tmp_path / 'in'}", f"out={tmp_path / 'a'}", "rows_per_shard=3")
    urls = str(tmp_path / "a" / "shard-{000000..000001}.tar")
    theirs = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
    gc.collect()
    ours = samples(tmp_path / "a")
    assert set(theirs) == set(ours)
    assert all(theirs[key][extension] == data for key, parts in ours.items() for extension, data in parts.items())
    write("source=webdataset", f"path={tmp_path / 'a'}", f"out={tmp_path / 'b'}")
    again = samples(tmp_path / "b")
    assert {key: (parts["jpg"], parts["txt"]) for key, parts in again.items()} == {k: (p["jpg"], p["txt"]) for k, p in ours.items()}


def test_finished_work_is_not_done_again(tmp_path: Path) -> None:
    words = ("source=glyphs", "glyphs.every=1000", "rows_per_shard=10", f"out={tmp_path / 'out'}", "processes=1")
    summary = write(*words)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    (tmp_path / "out" / "shard-000002.index.arrow").unlink()
    (tmp_path / "out" / ".shard-000001.tar.elsewhere_1-7-00000000.tmp").write_bytes(b"left by a killed writer")
    again = write(*words)
    assert (again.written, again.digest) == (summary.written, summary.digest)
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"shard-000002.tar", "shard-000002.index.arrow"}
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_another_plan_is_refused(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "in", 2)
    words = ("source=folder", f"path={folder}", f"out={tmp_path / 'out'}", "processes=1")
    write(*words)
    with pytest.raises(ConfigError, match=r"was begun with another plan: image.short_side was None, is 16. Give another `out`"):
        write(*words, "image.short_side=16")
    (folder / "photo1.jpg").write_bytes(encoded(gradient(9, 9)))
    with pytest.raises(ConfigError, match="the source now lists other samples or files"):
        write(*words)


def test_an_out_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"is not empty and was not begun by `mmscale shards write`: it holds 'letters.txt'"):
        write("source=glyphs", "glyphs.limit=3", f"out={tmp_path}")
    with pytest.raises(ConfigError, match="cannot be made: File exists"):
        write("source=glyphs", "glyphs.limit=3", f"out={tmp_path / 'letters.txt'}")
    with pytest.raises(SourceError, match="There is no folder at"):
        write("source=folder", f"path={tmp_path / 'none'}", f"out={tmp_path / 'out'}")


def test_members_have_no_times_and_one_owner(tmp_path: Path) -> None:
    write("source=glyphs", "glyphs.limit=2", f"out={tmp_path / 'out'}", "processes=1")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0o444, 0, 0, "bigdata", "bigdata")}


def test_questions_and_answers_from_a_table(tmp_path: Path) -> None:
    """As a user converts easy-VQA or SHAPES: several questions an image, no captions."""
    photo_folder(tmp_path, 2)
    rows = [{"image": f"photo{n % 2}.jpg", "question": f"what is {n}?", "answer": "blue"} for n in range(6)]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["source=table", f"path={tmp_path / 'vqa.jsonl'}", f"out={tmp_path / 'out'}", "columns.caption=null", "processes=1"]
    summary = write(*words, "tokenizer.kind=wordpiece", "tokenizer.fields=[question]", "tokenizer.vocab_size=100")
    assert summary.written == 6
    found = samples(tmp_path / "out")
    assert json.loads(found["photo1-3"]["json"])["question"] == "what is 5?"
    assert "txt" not in found["photo0"]
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emojitwo set is not beside the repository")
def test_emoji(tmp_path: Path) -> None:
    """Real pictures with names, by the words a user types."""
    table = ["source=table", f"path={EMOJI / 'emoji.tsv'}", f"table.image_root={EMOJI / 'png64'}", f"out={tmp_path}"]
    summary = write(*table, "columns.image=file", "columns.caption=name", "image.size=32", "tokenizer.kind=wordpiece")
    assert (summary.written, summary.quarantined.total()) == (1769, 0)
    found = samples(tmp_path)
    assert found["1f0cf"]["txt"] == b"joker"
    assert json.loads(found["1f0cf"]["json"])["keywords"] == "card | game | joker | wildcard"
    pixels = decoded(found["1f0cf"]["png"])
    assert pixels.shape == (32, 32, 3)
    assert pixels[0, 0].min() > 250  # transparent corners over white


def test_an_edited_list_of_denied_words_is_another_plan(tmp_path: Path) -> None:
    photo_folder(tmp_path / "photos", 2)
    (tmp_path / "words").write_text("cat\n")
    words = ("source=folder", f"path={tmp_path / 'photos'}", f"out={tmp_path / 'out'}", f"filter.deny_file={tmp_path / 'words'}")
    write(*words)
    write(*words)
    (tmp_path / "words").write_text("dog\n")
    with pytest.raises(ConfigError, match=r"was begun with another plan: filter\.deny_file was 'sha256 .*', is 'sha256 "):
        write(*words)
