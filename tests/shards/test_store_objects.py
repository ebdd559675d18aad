"""A data set behind s3://, http:// and other URLs reads as the folder does; what cannot be is said at once."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from shards.errors import ConfigError, IntegrityError, ShardError
from shards.index import build_manifest, index_tar
from shards.manifest import read_manifest
from shards.read import ShardReader
from shards.report import data_set_name, show_sample, summary
from shards.store.config import StoreConfig
from shards.store.place import is_url, normal, redacted
from shards.store.statistics import StoreStatistics
from shards.verify import verify
from tests.shards.bucket import upload
from tests.shards.faulty_proxy import FaultyProxy
from tests.shards.range_server import RangeServer
from tests.shards.tars import flip_bit, pair

REPO = Path(__file__).resolve().parents[2]


def everything(reader):
    return [reader[shard, row] for shard, rows in enumerate(reader.rows_per_shard) for row in range(rows)]


def test_s3_reads_as_the_folder_does(pairs, s3_port, s3_environment):
    upload(pairs, s3_port, "plain", "a b/")
    reader = ShardReader("s3://plain/a b/")
    assert reader.manifest.digest == ShardReader(pairs).manifest.digest
    assert everything(reader) == [pair(number) for number in range(60)]
    assert reader.key(3, 2) == "k0037"
    counts = reader.statistics()
    assert (counts.requests - counts.hedges, counts.retries) == (1 + 3 + 60, 0)  # manifest, sidecars, samples
    assert counts.bytes_fetched > 60 * 400
    assert 0 < counts.wait_s < 30
    assert ShardReader(pairs).statistics() == StoreStatistics()


def test_verify_and_show_of_a_url(pairs, s3_port, s3_environment, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "d")
    upload(folder, s3_port, "looked-at")
    assert verify("s3://looked-at", full=True).sound
    assert summary("s3://looked-at/").startswith("s3://looked-at: 60 samples in 4 shards")
    assert show_sample("s3://looked-at", "k0021").startswith("s-001.tar:k0021 (shard 1, row 1)")
    part = index_tar(folder / "s-001.tar")[2].parts[0]
    flip_bit(folder / "s-001.tar", part.offset)
    flip_bit(folder / "s-003.index.arrow", 700)
    (folder / "s-000.index.arrow").rename(folder / "t.tar")
    upload(folder, s3_port, "damaged")
    assert [str(fault)[:90] for fault in verify("s3://damaged", full=True).faults] == [
        "s-000.tar: its sidecar s-000.index.arrow is missing; run `mmscale shards index s3://damage",
        "s-001.tar: the tar's sha256 differs from the manifest's.",
        f"s-001.tar:k0022: the part 'jpg' at byte {part.offset} does not match its checksum crc32c {part.crc32c:08x}. The"[:90],
        "s-003.tar: the sha256 of its sidecar s-003.index.arrow differs from the manifest's.",
        "t.tar: the tar is not in the manifest; run `mmscale shards index s3://damaged` to take it "[:90],
    ]


def test_the_command_takes_a_url(pairs, s3_port, s3_environment):
    upload(pairs, s3_port, "commanded")
    command = [str(Path(sys.executable).parent / "mmscale"), "shards", "verify", "s3://commanded", "--full"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)}, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "no fault in 4 shards of 60 samples; 60 samples read, compared and decoded\n",
        "",
    )
    command[-2] = "s3://commanded/elsewhere"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)}, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("mmscale: There is no manifest.parquet at 's3://commanded/elsewhere'. Check the URL;")
    assert done.stderr.count("\n") == 1


def test_missing_things_are_named_at_once(pairs, s3_port, s3_environment, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "d")
    (folder / "s-001.tar").unlink()
    (folder / "s-003.index.arrow").unlink()
    upload(folder, s3_port, "holes")
    begin = time.monotonic()
    with pytest.raises(ShardError, match=r"There is no manifest\.parquet at 's3://no-such-bucket/d'\. Check the URL"):
        ShardReader("s3://no-such-bucket/d/")
    reader = ShardReader("s3://holes")
    with pytest.raises(ShardError, match=r"The shard 's-001\.tar' is no longer in 's3://holes'\. Copy it there again\."):
        reader[1, 0]
    with pytest.raises(ShardError, match=r"There is no sidecar 's3://holes/s-003\.index\.arrow'\. Upload the data set again"):
        reader[3, 0]
    cached = ShardReader("s3://holes", store=StoreConfig(cache=str(tmp_path / "cache")))
    with pytest.raises(ShardError, match=r"The shard 's-001\.tar' is no longer in 's3://holes'"):
        cached[1, 0]
    assert reader[0, 3] == cached[0, 3] == pair(3)
    assert reader.statistics().retries == cached.statistics().retries == 0
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (
            403,
            r"'{url}/manifest\.parquet' cannot be read: HTTP 403 Forbidden\. Check the permissions of the credentials in use: a user name",
        ),
        (401, r"cannot be read: HTTP 401 Unauthorized\. Check the permissions"),
        (400, r"cannot be read: HTTP 400 Bad Request\. Check the URL, the region and the endpoint\."),
    ],
)
def test_refusals_are_told_at_once(pairs, status, text):
    with RangeServer(pairs) as server:
        server.refuse_with(status)
        begin = time.monotonic()
        with pytest.raises(ShardError, match=text.format(url=server.url)) as caught:
            ShardReader(server.url)
        assert time.monotonic() - begin < 2
        assert "\n" not in str(caught.value)
        assert server.answered == 1


def test_http_by_byte_range_login_and_signed_urls_that_are_never_printed(pairs):
    with RangeServer(pairs, login="me:secret", query="sig=s3cr%2Ft&se=1") as server:
        url = f"http://me:secret@127.0.0.1:{server.port}/?sig=s3cr%2Ft&se=1"
        reader = ShardReader(url)
        assert everything(reader) == [pair(number) for number in range(60)]
        assert reader.store.root == f"http://127.0.0.1:{server.port}"
        with pytest.raises(ShardError) as caught:
            ShardReader(f"http://me:secret@127.0.0.1:{server.port}/none?sig=s3cr%2Ft&se=1")
        assert verify(url, full=True).sound  # a web server lists nothing: no strangers are looked for
        for text in (str(caught.value), repr(reader.store.root), summary(url)):
            assert "secret" not in text
            assert "s3cr" not in text
        assert data_set_name(url) == f"127.0.0.1:{server.port}"


def test_a_server_without_byte_ranges(pairs):
    with RangeServer(pairs, ranges=False) as server:
        reader = ShardReader(server.url)
        with pytest.raises(
            ShardError, match=r"/s-000\.tar' cannot be read: the server does not serve byte ranges\. Serve the folder by nginx"
        ):
            reader[0, 0]


def test_other_schemes_go_through_fsspec(pairs, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(f"{pairs}/", "/set/", recursive=True)
    reader = ShardReader("memory://set/")
    assert everything(reader) == [pair(number) for number in range(60)]
    assert verify("memory://set", full=True).sound
    cached = ShardReader("memory://set", store=StoreConfig(cache=str(tmp_path / "c"), chunk_bytes=5000))
    assert everything(cached) == [pair(number) for number in range(60)]
    memory.rm("/set/s-001.tar")
    with pytest.raises(ShardError, match=r"The shard 's-001\.tar' is no longer in 'memory://set'"):
        reader[1, 1]
    memory.rm("/set", recursive=True)
    with pytest.raises(ShardError, match=r"There is no manifest\.parquet at 'memory://set'"):
        ShardReader("memory://set")
    with pytest.raises(ConfigError, match=r"'nonesuch://x' cannot be opened: .*Known are folders, s3, gs, az, http and https"):
        ShardReader("nonesuch://x")


def test_urls_that_cannot_be_opened(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(
        ConfigError, match=r"'az://box/x' cannot be opened: .*Account must be specified\. Check the URL and the environment"
    ):
        ShardReader("az://box/x")
    with pytest.raises(ConfigError, match=r"'s3:///x' cannot be opened: .*Check the URL and the environment variables\."):
        ShardReader("s3:///x")


def test_no_credentials_are_said_to_be_missing(s3_environment):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        s3_environment.delenv(name)
    s3_environment.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ShardError, match=r"cannot be read: no credentials were found\. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        ShardReader("s3://private")


def test_a_truncated_object_is_named_by_its_first_sample(pairs, s3_port, s3_environment, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "d")
    part = index_tar(folder / "s-001.tar")[3].parts[0]
    os.truncate(folder / "s-001.tar", part.offset + 3)
    upload(folder, s3_port, "cut")
    for store in (StoreConfig(), StoreConfig(cache=str(tmp_path / "c"))):
        reader = ShardReader("s3://cut", store=store)
        assert reader[1, 2] == pair(22)
        with pytest.raises(
            IntegrityError, match=rf"s-001\.tar:k0023: the part 'jpg' .* is cut off: the tar holds 3 of its {part.size} bytes"
        ):
            reader[1, 3]
        with pytest.raises(IntegrityError, match=r"s-001\.tar:k0025: .* holds 0 of its .* The shard in 's3://cut' was damaged"):
            reader[1, 5]


def test_a_damaged_answer_is_fetched_once_more(pairs, s3_port, s3_environment):
    upload(pairs, s3_port, "bitrot")
    with FaultyProxy(s3_port, lambda method, path, ranges, nth: "damage" if path.endswith("s-001.tar") and nth == 0 else None) as proxy:
        s3_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert ShardReader("s3://bitrot")[1, 4] == pair(24)
    with FaultyProxy(s3_port, lambda method, path, ranges, nth: "damage" if path.endswith("s-001.tar") else None) as proxy:
        s3_environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(IntegrityError, match=r"s-001\.tar:k0024: the part .* of its|s-001\.tar:k0024: .* does not match its checksum"):
            ShardReader("s3://bitrot")[1, 4]
        assert len(proxy.gets("s-001.tar")) == 2


def test_pickle_carries_the_place_and_the_version(pairs, s3_port, s3_environment, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "d")
    upload(folder, s3_port, "versions")
    cached = pickle.dumps(ShardReader("s3://versions", store=StoreConfig(cache=str(tmp_path / "c"))))
    plain = pickle.dumps(ShardReader("s3://versions"))
    assert len(plain) < 400
    assert pickle.loads(plain)[1, 1] == pair(21)
    (folder / "s-000.tar").unlink()
    (folder / "s-000.index.arrow").unlink()
    shutil.copy(_other_manifest(folder), folder / "manifest.parquet")
    upload(folder, s3_port, "versions")
    with pytest.raises(
        ShardError, match=r"'s3://versions' holds another manifest\.parquet than when this run opened it\. Give each version"
    ):
        pickle.loads(plain)
    assert pickle.loads(cached)[1, 1] == pair(21)  # the node's cache has the version that the run began with


def _other_manifest(folder):
    build_manifest(folder)
    return shutil.copy(folder / "manifest.parquet", folder / ".other")


def test_a_forked_child_is_told_what_does_not_survive(pairs, s3_port, s3_environment):
    upload(pairs, s3_port, "forked")
    reader = ShardReader("s3://forked")
    assert reader[0, 0] == pair(0)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            reader[1, 0]
        except ShardError as e:
            os.write(theirs, str(e).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        assert "was forked after its parent had read from an object store" in (text := file.read())
    assert text.endswith("Start workers with multiprocessing_context='forkserver' or 'spawn'.")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reader[1, 0] == pair(20)


def test_places(pairs):
    assert [is_url(place) for place in ("s3://b/x", "/data/x", "C:/x", "data:x", Path("s3://b"))] == [True, False, False, False, False]
    assert normal("s3://b/x//") == "s3://b/x"
    assert normal("https://h/x/?sig=1") == "https://h/x?sig=1"
    assert ShardReader(f"file://{pairs}")[0, 0] == pair(0)
    text = "got http://u:p@h/x?sig=a&b=c and s3://k:s@b/y, not a@b?"
    assert redacted(text) == "got http://h/x?... and s3://b/y, not a@b?"
    manifest = read_manifest(pairs)
    assert manifest.folder == pairs


def test_what_needs_files_says_so(pairs, s3_port, s3_environment):
    upload(pairs, s3_port, "far")
    with pytest.raises(ShardError, match=r"This needs the data set's files in a folder; they are at 's3://far'\. Copy them first\."):
        _ = read_manifest("s3://far").folder


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache_bytes": 0}, r"`store\.cache_bytes` must be at least 1; got 0\."),
        ({"retries": -1}, r"`store\.retries` must be at least 0; got -1\."),
        ({"deadline_s": 0.0}, r"`store\.deadline_s` must be above 0 seconds; got 0\.0\."),
        ({"hedge_share": 0.9}, r"`store\.hedge_share` must be 0 to 0\.5; got 0\.9\."),
        ({"cache": "s3://b/x"}, r"`store\.cache` must be a folder of this machine; got 's3://b/x'\."),
    ],
)
def test_options_out_of_range(pairs, options, text):
    with pytest.raises(ConfigError, match=text):
        ShardReader(pairs, store=StoreConfig(**options))


@pytest.mark.slow
def test_no_process_aborts_at_its_end(pairs, s3_port, s3_environment):
    upload(pairs, s3_port, "ending")
    command = [str(Path(sys.executable).parent / "mmscale"), "shards", "verify", "s3://ending", "--full"]
    for _ in range(15):  # one in fourteen did, while obstore's threads were not waited for
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(REPO)}) for _ in range(4)]
        assert [process.wait() for process in processes] == [0] * 4
