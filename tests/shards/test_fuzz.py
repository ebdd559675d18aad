"""Any tar and any damage: what is read is what lies there, or it is refused by name."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shards.errors import IntegrityError, ShardError
from shards.index import adopt, index_tar, shard_info
from shards.manifest import sidecar_path
from shards.read import ShardReader
from tests.shards.tars import make_data_set, pair, write_tar

LETTERS = st.characters(exclude_characters="/.\0", exclude_categories=["Cs", "Cc"])
WORD = st.text(LETTERS, min_size=1, max_size=12)
EXTENSION = st.lists(st.text("aBc1é_-", min_size=0, max_size=4), min_size=1, max_size=3).map(".".join)
FOLDER = st.sampled_from(["", "dir/", "a.b/", "déjà/vu/", "x" * 120 + "/", "__meta__/", ".hidden/"])
ODD = st.sampled_from(["README", ".hidden", "__index__", "dir/.nothing", "link"])


@st.composite
def members(draw):
    """Members of a tar: samples of distinct keys, and others in between that are no parts."""
    found = []
    for number in range(draw(st.integers(0, 5))):
        key = draw(FOLDER) + draw(WORD) + str(number)
        extensions = draw(st.lists(EXTENSION, min_size=1, max_size=4, unique_by=str.lower))
        for extension in extensions:
            found.append((f"{key}.{extension}", tarfile.REGTYPE, draw(st.binary(max_size=1500))))
            if draw(st.booleans()):
                kind = draw(st.sampled_from([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.REGTYPE]))
                found.append((draw(ODD), kind, b""))
    return found


def build(path, found, format, mtime):
    with tarfile.open(path, "w", format=format) as tar:
        for name, kind, data in found:
            member = tarfile.TarInfo(name)
            member.type, member.mtime, member.linkname = kind, mtime, "elsewhere" if kind == tarfile.SYMTYPE else ""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def as_webdataset_groups(path):
    """Neighbours of one key, read by tarfile and split by webdataset's own function."""
    samples = []
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = base_plus_ext(member.name) if member.isreg() else (None, None)
            hidden = member.name.rpartition("/")[2].startswith(".")  # which webdataset takes for samples where they lie in a folder
            if key is None or hidden or member.name.startswith("__meta__/"):
                continue
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1][extension.lower()] = tar.extractfile(member).read()
    return samples


FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
NO_LIMIT = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@NO_LIMIT
@given(found=members(), format=FORMATS, mtime=st.sampled_from([0, 0.5, 2**34]))
@example(found=[("a.b.c", tarfile.REGTYPE, b""), ("a.", tarfile.REGTYPE, b"x")], format=tarfile.PAX_FORMAT, mtime=0.5)
def test_any_tar_reads_as_tarfile_sees_it(tmp_path_factory, found, format, mtime):
    folder = tmp_path_factory.mktemp("any")
    expected = as_webdataset_groups(build(folder / "a.b.tar", found, format, mtime))
    assert adopt(folder).rows == len(expected)
    reader = ShardReader(folder)
    assert [(sample.key, dict(sample.parts)) for sample in (reader[0, row] for row in range(len(reader)))] == expected
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("sound") / "d", (3, 2))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def damage(draw):
    """A function from a file's bytes to damaged ones."""
    where = draw(st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["flip", "cut", "zero", "insert", "swap"]))
    value = draw(st.integers(1, 255))

    def apply(data):
        at = int(where * len(data))
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + bytes([value]) + data[at:]
        if kind == "zero":
            return data[:at] + bytes(len(data[at : at + value])) + data[at + value :]
        if kind == "swap":
            return data[:at] + data[at : at + value][::-1] + data[at + value :]
        return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]

    return apply


def read_all(folder):
    reader = ShardReader(folder)
    return [reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]


def outcome(act):
    """Samples, or the text of the refusal."""
    try:
        return act(), ""
    except (ShardError, IntegrityError) as e:
        return None, str(e)


def adopt_and_read(folder):
    adopt(folder)
    return read_all(folder)


def lay_out(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@NO_LIMIT
@given(file=st.integers(0, 4), change=damage())
def test_damage_is_named_or_does_not_matter(tmp_path, sound, file, change):
    files = files_of(sound)
    name = sorted(files)[file]
    folder = lay_out(tmp_path / "d", files | {name: change(files[name])})
    samples, refusal = outcome(lambda: read_all(folder))
    assert samples == [pair(number) for number in range(5)] or name.partition(".")[0] in refusal


@NO_LIMIT
@given(change=damage())
def test_a_damaged_tar_is_adopted_as_tarfile_sees_it_or_refused(tmp_path, sound, change):
    folder = lay_out(tmp_path / "d", {"a.tar": change((sound / "s-000.tar").read_bytes())})
    for old in (sidecar_path(folder / "a.tar"), folder / "manifest.parquet"):
        old.unlink(missing_ok=True)
    samples, refusal = outcome(lambda: adopt_and_read(folder))
    if samples is None:
        assert "a.tar" in refusal
    else:
        assert [(sample.key, dict(sample.parts)) for sample in samples] == as_webdataset_groups(folder / "a.tar")


@NO_LIMIT
@given(change=damage())
def test_a_damaged_sidecar_is_made_again(tmp_path, sound, change):
    """`adopt` goes by sidecars that no manifest vouches for yet."""
    files = {name: data for name, data in files_of(sound).items() if name.startswith("s-000")}
    folder = lay_out(tmp_path / "d", files)
    sidecar = folder / "s-000.index.arrow"
    sidecar.write_bytes(change(sidecar.read_bytes()))
    (folder / "manifest.parquet").unlink(missing_ok=True)
    samples, refusal = outcome(lambda: adopt_and_read(folder))
    assert samples == [pair(number) for number in range(3)] or "s-000" in refusal


def test_a_name_that_is_no_utf_8_is_refused_by_name(tmp_path):
    build(tmp_path / "a.tar", [("k\udcff.txt", tarfile.REGTYPE, b"x")], tarfile.GNU_FORMAT, 0)
    with pytest.raises(ShardError, match=r"a\.tar.*'k\\udcff.txt'.*not UTF-8"):
        index_tar(tmp_path / "a.tar")


def test_a_tar_without_a_sidecar_has_no_information(tmp_path):
    with pytest.raises(ShardError, match="There is no sidecar"):
        shard_info(write_tar(Path(tmp_path) / "a.tar", [pair(0)]))
