import socket
from pathlib import Path

from shards.commit import commit_bytes, commit_first, remove_leftovers, temporary
from shards.owner import own_name


def test_commit_replaces_a_file_as_a_whole_and_ignores_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "f"
    temporary(path).write_bytes(b"left by a kill")
    commit_bytes(path, b"one")
    commit_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_of_several_stands(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert commit_first(path, b"one")
    assert not commit_first(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_ended_processes_go_and_those_of_others_stay(tmp_path: Path) -> None:
    machine = own_name().rsplit("-", 2)[0]
    ended, ours, elsewhere = f".a.tar.{machine}-4194304-00000000.tmp", temporary(tmp_path / "b").name, ".c.other_1-1-00000000.tmp"
    for name in (ended, ours, elsewhere, ".hidden", "d.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ours, elsewhere, ".hidden", "d.tmp"}
    remove_leftovers(tmp_path, all_of_them=True)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", "d.tmp"}
    assert socket.gethostname()[:3].replace(".", "_").replace("-", "_") in machine
