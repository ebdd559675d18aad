from shards.commit import commit_bytes, temporary


def test_commit_replaces_a_file_as_a_whole_and_ignores_leftovers(tmp_path):
    path = tmp_path / "f"
    temporary(path).write_bytes(b"left by a kill")
    commit_bytes(path, b"one")
    commit_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
