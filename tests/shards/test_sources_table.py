import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.errors import ConfigError, SampleError, SourceError
from shards.sources.record import RawSample, Record
from shards.sources.table import TableSource
from tests.shards.pictures import encoded, gradient, photo_folder

EMOJI = Path(__file__).resolve().parents[3] / "shared" / "data" / "emojitwo"


def source_of(path: Path | str, *words: str) -> TableSource:
    return TableSource(configfile.load(WriteConfig, None, ["source=table", f"path={path}", "out=unused", *words]))


def loaded(path: Path | str, *words: str) -> list[tuple[Record, RawSample]]:
    source = source_of(path, *words)
    return [(record, source.load(record)) for record in source.records()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photo_folder(tmp_path, 2)


def write_table(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"pairs.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if kind == "tsv" else ","
        lines = [mark.join(rows[0])] + [mark.join(str(cell) for cell in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_paths_in_every_kind_of_table(folder: Path, kind: str) -> None:
    rows = [{"file": f"photo{n % 2}.jpg", "name": f"name {n}", "question": "what?", "answer": str(n)} for n in range(5)]
    pairs = loaded(write_table(folder, kind, rows), "columns.image=file", "columns.caption=name")
    assert [record.key for record, _ in pairs] == ["photo0", "photo1", "photo0-2", "photo1-2", "photo0-3"]
    for number, (_, raw) in enumerate(pairs):
        assert raw.image == (folder / f"photo{number % 2}.jpg").read_bytes()
        assert raw.captions == [f"name {number}"]
        assert raw.fields == {"question": "what?", "answer": str(number)}


@pytest.mark.parametrize("as_struct", [False, True])
def test_image_bytes_in_parquet(folder: Path, as_struct: bool) -> None:
    images = [encoded(gradient(20 + n, 20)) for n in range(5)]
    rows = [
        {"image": {"bytes": image, "path": f"x/{n}.jpg"} if as_struct else image, "caption": [f"one {n}", "two"]}
        for n, image in enumerate(images)
    ]
    pairs = loaded(write_table(folder, "parquet", rows))
    assert [raw.image for _, raw in pairs] == images
    assert pairs[3][1].captions == ["one 3", "two"]
    assert [record.key for record, _ in pairs][:2] == (["x__0", "x__1"] if as_struct else ["pairs-000000000", "pairs-000000001"])
    assert pairs[0][1].fields == {}


def test_separated_captions_and_chosen_fields(folder: Path) -> None:
    path = write_table(folder, "tsv", [{"image": "photo0.jpg", "caption": "a | b |c", "x": "1", "y": '"2'}])
    [(_, raw)] = loaded(path, "columns.caption_separator='|'", "columns.fields=[y]")
    assert raw.captions == ["a ", " b ", "c"]
    assert raw.fields == {"y": '"2'}


def test_cells_that_become_lists(folder: Path) -> None:
    rows = [{"image": "photo0.jpg", "caption": "c", "tags": tags, "x": "1;2"} for tags in ("red; small;", "", "one")]
    pairs = loaded(write_table(folder, "csv", rows), "columns.lists=[tags]")
    assert [raw.fields for _, raw in pairs] == [{"tags": tags, "x": "1;2"} for tags in (["red", "small"], [], ["one"])]
    pairs = loaded(write_table(folder, "csv", rows), "columns.lists=[tags,x]", "columns.list_separator=','", "columns.fields=[x]")
    assert pairs[0][1].fields == {"x": ["1;2"]}
    with pytest.raises(ConfigError, match=r"`columns\.lists`: the table .* has no column 'tag'; it has image, caption, tags, x\."):
        loaded(write_table(folder, "csv", rows), "columns.lists=[tag]")


def test_key_column(folder: Path) -> None:
    rows = [{"image": "photo0.jpg", "caption": "c", "id": key} for key in ["a.b", "x", "x", ""]]
    records = source_of(write_table(folder, "csv", rows), "columns.key=id").records()
    assert [record.key for record in records] == ["a-b", "x", "x", "pairs-000000003"]
    assert [record.problem[0] if record.problem else None for record in records] == [None, "duplicate_key", "duplicate_key", "bad_key"]


def test_repeated_image_beside_a_key_that_looks_numbered(folder: Path) -> None:
    (folder / "photo0-2.jpg").write_bytes(encoded(gradient()))
    rows = [{"image": name, "caption": "c"} for name in ["photo0.jpg", "photo0.jpg", "photo0-2.jpg"]]
    assert [record.key for record, _ in loaded(write_table(folder, "csv", rows))] == ["photo0", "photo0-3", "photo0-2"]


def test_bad_rows(folder: Path) -> None:
    path = folder / "pairs.csv"
    path.write_bytes(b'image,caption\nphoto0.jpg,"quoted, and\nbroken"\nphoto1.jpg\nnone.jpg,x\n,no path\nphoto1.jpg,caf\xe9\n')
    source = source_of(path)
    good, short, missing, empty, latin = source.records()
    assert source.load(good).captions == ["quoted, and\nbroken"]
    assert short.problem == ("bad_row", "Line 4 has 1 cells; the header names 2 columns.")
    with pytest.raises(
        SampleError,
        match=r"none: missing_file: .*none.jpg': There is no such file\. Paths start from the table's folder; table.image_root names",
    ):
        source.load(missing)
    assert source.load(empty).image is None
    assert source.load(latin).captions == ["caf\udce9"]


def test_bad_json_lines(folder: Path) -> None:
    path = folder / "pairs.jsonl"
    path.write_text(
        '{"image": "photo0.jpg", "caption": ["a", "b"]}\n\n{\n[]\n{"image": 3, "caption": "x"}\n{"image": "photo1.jpg", "caption": {}}\n'
    )
    source = source_of(path)
    good, broken, no_mapping, number, mapping = source.records()
    assert source.load(good).captions == ["a", "b"]
    assert broken.problem is not None
    assert "Line 3 is not JSON" in broken.problem[1]
    assert no_mapping.problem == ("bad_row", "Line 4 must hold a mapping, not a list.")
    with pytest.raises(SampleError, match="bad_row: The image cell must be a path or bytes; got a int"):
        source.load(number)
    with pytest.raises(SampleError, match="bad_caption"):
        source.load(mapping)


def test_huge_cell(folder: Path) -> None:
    path = write_table(folder, "csv", [{"image": "photo0.jpg", "caption": "x" * 1_000_000}])
    [(_, raw)] = loaded(path)
    assert len(raw.captions[0]) == 1_000_000


def test_no_captions_no_images(folder: Path) -> None:
    path = write_table(folder, "csv", [{"question": "q", "answer": "a"}])
    [(record, raw)] = loaded(path, "columns.caption=null", "columns.image=null")
    assert (record.key, raw.image, list(raw.captions)) == ("pairs-000000000", None, [])
    assert raw.fields == {"question": "q", "answer": "a"}


def test_image_root_and_several_files(folder: Path) -> None:
    tables = folder / "tables"
    tables.mkdir()
    for part in range(2):
        (tables / f"part-{part}.csv").write_text(f"image,caption\nphoto{part}.jpg,c{part}\n")
    for path in (tables, tables / "part-*.csv", tables / "part-{0..1}.csv"):
        assert [raw.captions for _, raw in loaded(path, f"table.image_root={folder}")] == [["c0"], ["c1"]]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_missing_column(folder: Path, kind: str) -> None:
    path = write_table(folder, kind, [{"file": "photo0.jpg", "name": "x"}])
    with pytest.raises(
        ConfigError, match=r"`columns.image`: the table .* has no column 'image'; it has file, name. Set columns.image to one"
    ):
        source_of(path).records()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty. Its first line must name the columns"),
        ("a.csv", "image,caption\n", "has no rows"),
        ("a.xls", "x", "is not a table that can be read. Give a file that ends in .csv"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_unusable_tables(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        source_of(tmp_path / name).records()
    with pytest.raises(SourceError, match="There is nothing at"):
        source_of(tmp_path / "none.csv")


@pytest.mark.skipif(not EMOJI.is_dir(), reason="the emojitwo set is not beside the repository")
def test_emoji_table() -> None:
    words = ["columns.image=file", "columns.caption=name", f"table.image_root={EMOJI / 'png64'}"]
    source = source_of(EMOJI / "emoji.tsv", *words)
    records = source.records()
    assert len(records) == 1769
    assert all(record.problem is None for record in records)
    assert source.load(records[0]).captions == ["keycap: #"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_paths_start_from_their_own_table(tmp_path: Path, kind: str) -> None:
    for name, width in (("a", 10), ("b", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(gradient(width, 20), "PNG"))
        write_table(tmp_path / name, kind, [{"image": "0.png", "caption": f"picture of {name}"}])
    pairs = loaded(f"{tmp_path}/*/pairs.{kind}")
    assert len({record.key for record, _ in pairs}) == 2
    for (_, raw), name in zip(pairs, "ab", strict=True):
        assert (raw.image, raw.captions) == ((tmp_path / name / "0.png").read_bytes(), [f"picture of {name}"])


def test_a_quote_that_is_closed_nowhere(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    lines = ["image,caption", *(f"{n}.png,caption {n}" for n in range(100))]
    lines[51] = '50.png,"a 19"" screen'
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        SourceError, match=r"opens a quote in the row of line 52 that is closed nowhere: all that follows would be one cell"
    ):
        source_of(table).records()
    assert len(source_of(table, "table.quoted=false").records()) == 100
    for other in ('98.png,"caption, 98"', '51.png,"z"', '98.png,"caption" 98'):
        place = int(other[:2]) + 1
        table.write_text("\n".join([*lines[:place], other, *lines[place + 1 :]]) + "\n")
        bad = [record.problem for record in source_of(table).records() if record.problem is not None]
        assert bad == [("bad_row", bad[0][1])]
        assert bad[0][1].startswith(f"The row goes from line 52 to {place + 1}: a quote is not closed where it should be.")


def test_text_after_a_closed_quote_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('image,caption\n0.png,"a" b\n1.png,"two\nlines"\n')
    assert [record.locator[1]["caption"] for record in source_of(tmp_path / "pairs.csv").records()] == ["a b", "two\nlines"]


def test_a_row_of_very_many_lines_is_rows_that_a_quote_has_swallowed(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text('image,caption\na.png,"two\nlines"\nb.png,"x\n' + "c.png,c\n" * 60 + 'd.png,"\n')
    first, second = source_of(table).records()
    assert first.problem is None
    assert second.problem == (
        "bad_row",
        "The row goes from line 4 to 65: a quote is not closed where it should be. Mend it, or set table.quoted=false if quotes mean "
        "nothing.",
    )


def test_a_long_text_in_quotes_is_a_cell(tmp_path: Path) -> None:
    text = "".join(f"line {n}, of a transcript, with commas\n" for n in range(80))
    (tmp_path / "pairs.csv").write_text(f'image,caption\n0.png,"{text}"\n')
    assert [record.locator[1]["caption"] for record in source_of(tmp_path / "pairs.csv").records()] == [text]


def test_no_line_of_a_text_is_lost_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('image,title,caption\na.png,"x" y,"line one\nline two"\nb.png,b,c\n')
    first, second, third = source_of(tmp_path / "pairs.csv").records()
    assert [record.problem is None for record in (first, second, third)] == [False, False, True]


def test_columns_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption,,\na.png,b,,\n")
    assert len(source_of(tmp_path / "pairs.csv").records()) == 1


def test_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption,caption\na.png,one,two\n")
    with pytest.raises(SourceError, match="names the column 'caption' more than once"):
        source_of(tmp_path / "pairs.csv").records()
