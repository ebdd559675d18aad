import pytest
from PIL import Image

from shards.errors import DataError
from shards.index import adopt
from shards.read import ShardReader
from shards.report import find, render, show_sample, statistics, summary
from shards.sample import Sample
from tests.shards.tars import jpeg, make_data_set, pair, write_tar


def test_statistics_come_from_the_sidecars(tmp_path):
    samples = [pair(0), Sample("wide", {"jpg": jpeg(1, 80, 20)}), Sample("text", {"txt": b"abc"})]
    write_tar(tmp_path / "a.tar", samples)
    write_tar(tmp_path / "b.tar", [pair(2)])
    adopt(tmp_path)
    found = statistics(tmp_path)
    assert (found.rows, found.shard_rows.tolist()) == (4, [3, 1])
    assert sorted(found.widths.tolist()) == [24, 24, 80]
    assert sorted(found.heights.tolist()) == [16, 16, 20]
    assert sorted(found.caption_lengths.tolist()) == [3, 9, 9]
    assert found.sample_bytes.tolist() == [sum(map(len, sample.parts.values())) for sample in [*samples, pair(2)]]
    assert found.part_counts == {"jpg": 3, "txt": 3, "json": 2}
    assert found.part_bytes["txt"] == 21


def test_summary(tmp_path):
    text = summary(make_data_set(tmp_path / "d"))
    assert "12 samples in 3 shards" in text
    assert "width 24 / 24.0 / 24   height 16 / 16.0 / 16 pixels" in text
    assert "captions  12 of 12   9 / 9.2 / 10 characters" in text
    assert ".jpg      12 parts" in text


def test_show_sample_names_its_parts_and_saves_its_picture(tmp_path):
    folder = make_data_set(tmp_path / "d")
    text = show_sample(folder, "k0006", tmp_path / "k.png")
    assert text.startswith("s-001.tar:k0006 (shard 1, row 1)")
    assert '{"number": 6}' in text
    assert "caption 6" in text
    with Image.open(tmp_path / "k.png") as image:
        assert image.size == (24, 16)


def test_an_unknown_key_is_named(tmp_path):
    folder = make_data_set(tmp_path / "d")
    assert find(ShardReader(folder), "k0009") == (2, 1)
    with pytest.raises(DataError, match=r"No sample of .* has the key 'k9'\. Keys look like 'k0000'"):
        show_sample(folder, "k9")


def test_contact_sheet_is_drawn_whatever_the_samples_hold(tmp_path):
    samples = [
        *(pair(number) for number in range(12)),
        Sample("broken", {"jpg": b"no picture", "txt": "日本語 $x_1$ \U0001f600".encode()}),
        Sample("latin", {"txt": "é".encode("latin-1")}),
        Sample("long", {"txt": b"word " * 500, "jpg": jpeg(3, 300, 20)}),
        Sample("alone", {"json": b"{}"}),
    ]
    write_tar(tmp_path / "a.tar", samples)
    adopt(tmp_path)
    render(tmp_path, tmp_path / "one.png")
    render(tmp_path, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.width == 1680
        assert len(image.convert("RGB").getcolors(1 << 24)) > 500


def test_contact_sheet_without_pictures_or_captions(tmp_path):
    write_tar(tmp_path / "a.tar", [Sample("alone", {"json": b'{"label": 1}'})])
    adopt(tmp_path)
    render(tmp_path, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
