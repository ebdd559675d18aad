"""Copies in an object store, a real S3 server: whole or not there, through kills, faults and damage; and going on from them."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from mmscale.checkpoint import manifest
from mmscale.checkpoint.copies import BAD
from mmscale.checkpoint.find import committed, name_of, resolve, step_of
from mmscale.checkpoint.retention import PINNED, pin
from mmscale.recovery_config import CheckpointConfig
from shards.errors import ConfigError
from tests.checkpoint.crashing import save
from tests.checkpoint.forks import Forks
from tests.checkpoint.stored import copy, go_on
from tests.checkpoint.test_crash import copied, newest_step
from tests.shards.bucket import upload
from tests.shards.faulty_proxy import Faults, FaultyProxy


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A run with checkpoints of steps 1 and 2. Not to be changed: copy it."""
    run = tmp_path_factory.mktemp("copies") / "run"
    for step in (1, 2):
        assert forks(save, 2, run=str(run), step=step)[0] == [0, 0]
    return run


class Place:
    """A bucket of a test's own, and what lies in it."""

    def __init__(self, port: int, empty: Path) -> None:
        self.port, self.bucket = port, f"b{random.randrange(1 << 40):x}"
        self.url = f"s3://{self.bucket}/runs/x"
        empty.mkdir()
        upload(empty, port, self.bucket)
        keys = {"access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
        self.store = S3Store(self.bucket, endpoint=f"http://127.0.0.1:{port}", client_options={"allow_http": True}, **keys)  # type: ignore[arg-type]

    def objects(self) -> dict[str, int]:
        """Name -> bytes."""
        return {meta["path"].removeprefix("runs/x/"): meta["size"] for meta in obstore.list(self.store).collect()}

    def whole(self) -> list[int]:
        """Steps of the copies that have a manifest."""
        return sorted(int(name[5:13]) for name in self.objects() if name.endswith(manifest.NAME))

    def change(self, name: str, content: bytes | None) -> None:
        """Replace an object whose name ends so, or delete it."""
        found = next(o for o in sorted(self.objects(), reverse=True) if o.endswith(name))
        if content is None:
            obstore.delete(self.store, f"runs/x/{found}")
        else:
            obstore.put(self.store, f"runs/x/{found}", content)

    def read(self, name: str) -> bytes:
        """Content of the last object whose name ends so."""
        found = next(o for o in sorted(self.objects(), reverse=True) if o.endswith(name))
        return bytes(obstore.get(self.store, f"runs/x/{found}").bytes())


@pytest.fixture
def place(s3_port: int, tmp_path: Path) -> Iterator[Place]:
    """An empty bucket."""
    return Place(s3_port, tmp_path / "empty")


def test_a_copy_has_the_same_files_and_a_lost_run_folder_goes_on_from_it(
    two_steps: Path, tmp_path: Path, place: Place, forks: Forks
) -> None:
    run = copied(two_steps, tmp_path / "run")
    codes, (said,) = forks(copy, 1, run=str(run), url=place.url, port=place.port)
    assert codes == [0]
    assert len(said) == 1
    assert said[0].startswith(f"copied the checkpoint of step 2 to {place.url}/step-00000002.")
    newest = resolve(run)
    assert {n.partition("/")[2]: size for n, size in place.objects().items()} == {
        p.relative_to(newest).as_posix(): p.stat().st_size for p in newest.rglob("*") if p.is_file()
    }
    assert forks(copy, 1, run=str(run), url=place.url, port=place.port)[1] == [[]]  # it is there
    lost = tmp_path / "lost"
    _, results = forks(go_on, 2, run=str(lost), url=place.url, port=place.port)
    assert [r["step"] for r in results] == [2, 2], results
    assert newest_step(lost) == 2
    assert manifest.find_fault(resolve(lost)) is None
    assert sorted(p.name for p in (lost / "checkpoints").iterdir()) == [name_of(2)]
    _, results = forks(go_on, 2, run=str(run), url=place.url, port=place.port)  # as new here: nothing is fetched
    assert [(r["step"], r["said"]) for r in results] == [(2, []), (2, [])]


def test_a_kill_at_any_request_leaves_a_copy_that_is_whole_or_none(two_steps: Path, tmp_path: Path, place: Place, forks: Forks) -> None:
    run = copied(two_steps, tmp_path / "run")
    assert forks(copy, 1, run=str(run), url=place.url, port=place.port, step=1)[0] == [0]
    assert place.whole() == [1]
    at = -1

    def kill(method: str, path: str, byte_range: str | None, nth: int) -> str | None:
        if len(proxy.passed) == at:
            os.kill(int((run / "pid").read_text()), signal.SIGKILL)
            return "reset"
        return None

    with FaultyProxy(place.port, kill) as proxy:
        for at in range(100):
            proxy.passed.clear()
            before = place.objects()
            codes, _ = forks(copy, 1, run=str(run), url=place.url, port=proxy.port)
            if codes == [0]:
                break
            assert codes == [-9]
            last = [p.path for p in proxy.passed if p.method == "PUT"][-1:]
            lost = tmp_path / f"lost-{at}"
            _, results = forks(go_on, 2, run=str(lost), url=place.url, port=place.port)
            whole = 2 if any(o.startswith(name_of(2)) and o.endswith(manifest.NAME) for o in place.objects()) else 1
            assert [r["step"] for r in results] == [whole] * 2, (at, last, results)
            assert newest_step(lost) == whole
            for name in set(place.objects()) - set(before):  # each attempt begins anew, for every point to come
                obstore.delete(place.store, f"runs/x/{name}")
    assert at > 7  # list, five files, list, manifest, list, list
    assert place.whole() == [1, 2]


def test_what_a_killed_copy_has_sent_is_not_sent_again(two_steps: Path, tmp_path: Path, place: Place, forks: Forks) -> None:
    run = copied(two_steps, tmp_path / "run")
    forks(copy, 1, run=str(run), url=place.url, port=place.port)
    place.change(manifest.NAME, None)
    place.change("run.json", None)
    with FaultyProxy(place.port) as proxy:
        assert forks(copy, 1, run=str(run), url=place.url, port=proxy.port)[0] == [0]
        assert [p.path.rpartition("/")[2] for p in proxy.passed if p.method == "PUT"] == ["run.json", manifest.NAME]


def test_a_cut_upload_is_sent_again_and_never_vouched_for(two_steps: Path, tmp_path: Path, place: Place, forks: Forks) -> None:
    run = copied(two_steps, tmp_path / "run")
    forks(copy, 1, run=str(run), url=place.url, port=place.port, step=1)
    cut = lambda method, path, ranges, nth: "truncate" if method == "PUT" and "rank-00001" in path else None  # noqa: E731
    with FaultyProxy(place.port, cut) as proxy:
        codes, (said,) = forks(copy, 1, run=str(run), url=place.url, port=proxy.port)
    assert codes == [0]
    assert said[0].startswith("ALERT the checkpoint of step 2 was not copied: The copy ")
    assert "was given up: state/rank-00001.safetensors has " in said[0]
    assert place.whole() == [1]
    with FaultyProxy(place.port, lambda method, path, ranges, nth: cut(method, path, ranges, nth) if nth == 0 else None) as proxy:
        codes, (said,) = forks(copy, 1, run=str(run), url=place.url, port=proxy.port)
    assert said[0].startswith("copied the checkpoint of step 2")
    assert place.whole() == [1, 2]
    _, results = forks(go_on, 2, run=str(tmp_path / "lost"), url=place.url, port=place.port)
    assert [r["step"] for r in results] == [2, 2], results


def test_through_a_store_that_fails(tmp_path: Path, place: Place, forks: Forks) -> None:
    """One request in twenty, and some lost connections, with a file that travels in parts; both ways."""
    folder = tmp_path / "run" / "checkpoints" / name_of(7)
    (folder / "state").mkdir(parents=True)
    sizes = {f"state/{i:02}.bin.txt": 100 + i for i in range(60)} | {"state/large.txt": 12 << 20}
    for name, size in sizes.items():
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    entries = [manifest.describe_file(folder, folder / name) for name in sizes]
    (folder / manifest.NAME).write_text(manifest.to_json(entries, 7))
    drawn = Faults(fail=0.05, throttle=0.01, reset=0.01, seed=1)
    # Places and uploads have other names in every run: what is drawn must not hang on them.
    faults = lambda method, path, ranges, nth: drawn(method, _apart_from_names(path), ranges, nth)  # noqa: E731
    with FaultyProxy(place.port, faults) as proxy:
        _, (said,) = forks(copy, 1, run=str(tmp_path / "run"), url=place.url, port=proxy.port)
        assert said[0].startswith("copied the checkpoint of step 7"), said
        assert place.objects() == {f"{folder.name}.{name}": size for name, size in _copy_of(folder).items()}
        _, results = forks(go_on, 2, run=str(tmp_path / "lost"), url=place.url, port=proxy.port)
        assert [r["step"] for r in results] == [7, 7], results
        assert len([p for p in proxy.passed if p.fault]) > 5
        assert any("partNumber=3" in p.path for p in proxy.passed)
    assert manifest.find_fault(tmp_path / "lost" / "checkpoints" / name_of(7)) is None


def _apart_from_names(path: str) -> str:
    """The file and the part's number, without the bucket, the copy's digits and the upload's id."""
    path, _, query = path.partition("?")
    return f"{path.rpartition('/')[2]}?{re.sub(r'(uploadId|x-id)=[^&]*&?', '', query)}"


def _copy_of(folder: Path) -> dict[str, int]:
    digits = manifest.describe_file(folder, folder / manifest.NAME).sha256[:12]
    return {f"{digits}/{p.relative_to(folder).as_posix()}": p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("rank-00001.safetensors", lambda c: c[:-1], r"state/rank-00001.safetensors has 2111 bytes instead of 2112"),
        ("rank-00000.safetensors", lambda c: c[:-1] + bytes([c[-1] ^ 1]), "state/rank-00000.safetensors does not match its sha256"),
        ("index.json", lambda c: None, "state/index.json is missing"),
        (manifest.NAME, lambda c: c.replace(b'"step": 2', b'"step": 3'), "MANIFEST.json does not match the copy's name"),
    ],
)
def test_a_damaged_copy_is_named_and_the_one_before_it_used(
    two_steps: Path, tmp_path: Path, place: Place, forks: Forks, file: str, change: object, message: str
) -> None:
    run = copied(two_steps, tmp_path / "run")
    for step in (1, 2):
        forks(copy, 1, run=str(run), url=place.url, port=place.port, step=step)
    place.change(file, change(place.read(file)))  # type: ignore[operator]
    lost = tmp_path / "lost"
    _, results = forks(go_on, 2, run=str(lost), url=place.url, port=place.port)
    assert [r["step"] for r in results] == [1, 1], results
    assert newest_step(lost) == 1
    warned = [line for line in results[0]["said"] if "is damaged" in line]
    assert len(warned) == 1
    assert warned[0].endswith(f" is damaged: {message}. The one before it is used.")
    assert place.whole() == [1]
    assert place.read(BAD).decode() == message
    _, results = forks(go_on, 2, run=str(run), url=place.url, port=place.port)  # the run folder's own is newer than what is whole there
    assert [r["step"] for r in results] == [2, 2]
    _, (said,) = forks(copy, 1, run=str(run), url=place.url, port=place.port)
    assert said[0].startswith("copied the checkpoint of step 2"), said
    _, results = forks(go_on, 2, run=str(tmp_path / "again"), url=place.url, port=place.port)
    assert [r["step"] for r in results] == [2, 2], results


def test_copies_are_kept_by_the_rules_of_the_run_folder(tmp_path: Path, place: Place, forks: Forks) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3, 4):
        assert forks(save, 2, run=str(run), step=step)[0] == [0, 0]
        if step == 2:
            pin(run / "checkpoints" / name_of(2))
        assert forks(copy, 1, run=str(run), url=place.url, port=place.port)[0] == [0]
    assert [step_of(f) for f in committed(run / "checkpoints")] == [2, 3, 4]
    assert place.whole() == [2, 3, 4]
    place.change("run.json", None)
    place.change(manifest.NAME, None)  # as a copy that was killed leaves it
    assert place.whole() == [2, 3]
    pin(run / "checkpoints" / name_of(2), pinned=False)
    assert forks(save, 2, run=str(run), step=5)[0] == [0, 0]
    assert forks(copy, 1, run=str(run), url=place.url, port=place.port, keep=1)[0] == [0]
    assert {name[:13] for name in place.objects()} == {name_of(2), name_of(5)}  # for all that is known, the folder was lost
    assert forks(save, 2, run=str(run), step=6)[0] == [0, 0]
    assert forks(copy, 1, run=str(run), url=place.url, port=place.port, keep=1, released=[2])[0] == [0]
    assert {name[:13] for name in place.objects()} == {name_of(6)}


def test_a_pin_travels_with_the_copy(two_steps: Path, tmp_path: Path, place: Place, forks: Forks) -> None:
    run, lost = copied(two_steps, tmp_path / "run"), tmp_path / "lost"
    pin(run / "checkpoints" / name_of(2))
    forks(copy, 1, run=str(run), url=place.url, port=place.port)
    assert any(name.endswith(PINNED) for name in place.objects())
    forks(go_on, 2, run=str(lost), url=place.url, port=place.port)
    assert (resolve(lost) / PINNED).exists()
    assert forks(save, 2, run=str(lost), step=3)[0] == [0, 0]
    (lost / "checkpoints" / name_of(2) / PINNED).unlink()
    forks(copy, 1, run=str(lost), url=place.url, port=place.port)
    assert not any(name.endswith(PINNED) for name in place.objects())


def test_a_store_that_is_not_there_stops_a_start_and_no_training(two_steps: Path, tmp_path: Path, forks: Forks) -> None:
    run = copied(two_steps, tmp_path / "run")
    _, results = forks(go_on, 2, run=str(run), url="s3://nowhere/x", port=1)
    for result in results:
        assert result["error"].startswith(
            "The copies of this run's checkpoints in s3://nowhere/x cannot be gone on from: 's3://nowhere/x' cann"
        )
        assert result["error"].endswith("or go on from the run folder alone with checkpoint.copy_to=null.")
    codes, (said,) = forks(copy, 1, run=str(run), url="s3://nowhere/x", port=1)
    assert codes == [0]
    assert said[0].startswith("ALERT the checkpoint of step 2 was not copied: 's3://nowhere/x/step-00000002.")


@pytest.mark.parametrize("place", ["/data/copies", "file:///data", "https://host/x", "s3://", "memory://x"])
def test_places_that_are_no_object_store_are_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"`checkpoint\.copy_to` must be the URL of an object store, such as s3://bucket/run; got "):
        CheckpointConfig(copy_to=place).check()
