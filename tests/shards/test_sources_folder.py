import os
from pathlib import Path

import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.errors import ConfigError, SampleError, SourceError
from shards.sources.folder import FolderSource
from shards.sources.record import MAX_KEY_BYTES, Record, read_file, refuse_shared_keys, safe_key
from tests.shards.pictures import encoded, gradient, photo_folder


def source_of(folder: Path, *words: str) -> FolderSource:
    return FolderSource(configfile.load(WriteConfig, None, ["source=folder", f"path={folder}", "out=unused", *words]))


def listed(folder: Path) -> dict[str, Record]:
    return {record.where: record for record in source_of(folder).records()}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cat", "cat"),
        ("a/b/cat", "a__b__cat"),
        ("v1.2", "v1-2"),
        ("a b\tc\x07", "a_b_c_"),
        ("_/x", "x"),
        ("caf\u00e9", "caf\u00e9"),
        ("..", "--"),
    ],
)
def test_safe_key(name: str, key: str) -> None:
    assert safe_key(name) == key


def test_long_keys_stay_distinct_and_fit() -> None:
    keys = {safe_key("\u00e9" * 100 + str(number)) for number in range(50)}
    assert len(keys) == 50
    assert max(len(key.encode()) for key in keys) <= MAX_KEY_BYTES


def test_pairs_at_any_depth(tmp_path: Path) -> None:
    photo_folder(tmp_path / "b" / "deep", 1)
    image = encoded(gradient())
    (tmp_path / "A.JPG").write_bytes(image)
    (tmp_path / "A.json").write_text('{"captions": ["one", "two"], "label": 3}')
    (tmp_path / "both.png").write_bytes(encoded(gradient(), "PNG"))
    (tmp_path / "both.txt").write_text("from txt")
    (tmp_path / "both.json").write_text('{"caption": "from json"}')
    (tmp_path / ".hidden.jpg").write_bytes(image)
    (tmp_path / "notes.md").write_text("no sample")
    source = source_of(tmp_path)
    records = source.records()
    assert [record.key for record in records] == ["A", "b__deep__photo0", "both"]
    first, second, third = (source.load(record) for record in records)
    assert (first.image, first.captions, first.fields) == (image, ["one", "two"], {"label": 3})
    assert second.captions == [b"photo number 0"]
    assert (third.captions, third.fields) == ([b"from txt"], {"caption": "from json"})


def test_two_files_of_one_key_are_both_refused(tmp_path: Path) -> None:
    photo_folder(tmp_path, 2)
    (tmp_path / "photo0.png").write_bytes(encoded(gradient(), "PNG"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").write_bytes(encoded(gradient()))
    (tmp_path / "a__b.jpg").write_bytes(encoded(gradient()))
    records = listed(tmp_path)
    assert records["photo0.jpg"].problem == ("duplicate_key", "2 inputs have the key 'photo0': photo0.jpg, photo0.png.")
    assert records["photo0.png"].problem is not None
    assert records["a/b.jpg"].problem is not None
    assert records["photo1.jpg"].problem is None


def test_links(tmp_path: Path) -> None:
    folder = photo_folder(tmp_path / "in", 2)
    outside = photo_folder(tmp_path / "out", 1)
    (folder / "inside.jpg").symlink_to(folder / "photo1.jpg")
    (folder / "outside.jpg").symlink_to(outside / "photo0.jpg")
    (folder / "broken.jpg").symlink_to(folder / "nothing.jpg")
    (folder / "photo0.json").symlink_to(outside / "photo0.txt")
    (folder / "linked").symlink_to(outside)
    records = listed(folder)
    reasons = {where: record.problem[0] if record.problem else None for where, record in records.items()}
    assert reasons == {
        "inside.jpg": None,
        "outside.jpg": "outside_folder",
        "broken.jpg": "missing_file",
        "photo0.jpg": "outside_folder",
        "photo1.jpg": None,
        "linked": "linked_folder",
    }


def test_caption_without_image(tmp_path: Path) -> None:
    photo_folder(tmp_path, 1)
    (tmp_path / "alone.txt").write_text("no image")
    source = source_of(tmp_path)
    alone = source.load(source.records()[0])
    assert (alone.image, alone.captions) == (None, [b"no image"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "bad_json"), ("[1]", "bad_json"), ('{"caption": 3}', "bad_caption"), ('{"captions": ["a", 1]}', "bad_caption")],
)
def test_bad_json(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(gradient()))
    (tmp_path / "a.json").write_text(text)
    source = source_of(tmp_path)
    with pytest.raises(SampleError, match=f"^a: {reason}: "):
        source.load(source.records()[0])


def test_read_file_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(100))
    for name, reason in [
        ("pipe", "not_a_file"),
        (".", "not_a_file"),
        ("none", "missing_file"),
        ("a\0b", "missing_file"),
        ("large", "file_too_large"),
    ]:
        with pytest.raises(SampleError, match=f"^k: {reason}: "):
            read_file("k", tmp_path / name, 50)


def test_nothing_to_list(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no image, .* Give another `path`"):
        listed(tmp_path)
    with pytest.raises(SourceError, match=r"There is no folder at .*/none'. Give the `path` of an existing folder"):
        listed(tmp_path / "none")


def test_shared_keys_among_refused_records() -> None:
    bad = Record("a", "1", None, ("missing_file", "x"))
    good = Record("a", "2")
    assert refuse_shared_keys([bad, good]) == [bad, good]


def class_folder(root: Path) -> Path:
    for name in ("001 - Dog bark/1-30226-A.jpg", "001 - Dog bark/5-20.jpg", "002 - Rain/1-17367-A.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(gradient()))
    return root


def fields_of(folder: Path, *words: str) -> dict[str, dict[str, str]]:
    source = source_of(folder, *words)
    return {record.where: dict(source.load(record).fields) for record in source.records()}


def test_the_folder_is_the_class(tmp_path: Path) -> None:
    found = fields_of(class_folder(tmp_path), "folder.label=label")
    assert [fields["label"] for fields in found.values()] == ["001 - Dog bark", "001 - Dog bark", "002 - Rain"]
    (tmp_path / "stray.jpg").write_bytes(encoded(gradient()))
    with pytest.raises(SampleError, match=r"^stray: no_label: The file lies in no folder"):
        fields_of(tmp_path, "folder.label=label")


def test_named_groups_of_a_pattern_are_fields(tmp_path: Path) -> None:
    words = r"folder.pattern='\d+ - (?P<label>[^/]+)/(?P<fold>\d)-.*-A\.jpg'"
    assert fields_of(class_folder(tmp_path), words) == {
        "001 - Dog bark/1-30226-A.jpg": {"label": "Dog bark", "fold": "1"},
        "002 - Rain/1-17367-A.jpg": {"label": "Rain", "fold": "1"},
    }
    with pytest.raises(
        SourceError, match=r"`folder.pattern` 'x' matches none of the 3 paths in .*, such as '001 - Dog bark/1-30226-A.jpg'\."
    ):
        source_of(tmp_path, "folder.pattern=x").records()
    with pytest.raises(ConfigError, match=r"`folder.pattern` is no regular expression: .*; got '\('\."):
        configfile.load(WriteConfig, None, ["source=folder", "path=x", "out=y", "folder.pattern='('"]).check()


def test_a_published_list_of_files(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "in")
    listing = tmp_path / "trainlist01.txt"
    listing.write_text("002 - Rain/1-17367-A.jpg 2\n\n001 - Dog bark/5-20\n003 - Sea/1.jpg\n")
    records = source_of(folder, f"folder.listed={listing}").records()
    assert [(r.where, r.problem) for r in records] == [
        ("002 - Rain/1-17367-A.jpg", None),
        ("001 - Dog bark/5-20.jpg", None),
        ("trainlist01.txt:4", ("missing_file", "The folder holds no '003 - Sea/1.jpg'.")),
    ]
    listing.write_text("elsewhere/1.jpg\n")
    with pytest.raises(SourceError, match=r"`folder.listed`: no line of .* names a file of the folder, such as"):
        source_of(folder, f"folder.listed={listing}").records()
