"""Which hosts and slots of a hostfile are used."""

from pathlib import Path

import pytest

from launcher.cluster import ClusterConfig, HostsConfig
from launcher.hosts import choose_hosts, read_hostfile
from shards.errors import ConfigError

LISTED = {"a": 4, "b": 2, "c": 2}


def choose(nodes: int | None = None, ranks_per_node: int | None = None, **hosts: str) -> dict[str, tuple[int, ...]]:
    cluster = ClusterConfig(nodes=nodes, ranks_per_node=ranks_per_node, hosts=HostsConfig(hostfile="hosts", **hosts))
    return dict(choose_hosts(LISTED, cluster))


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, {"a": (0, 1, 2, 3), "b": (0, 1), "c": (0, 1)}),
        ({"include": "c@a:1,3"}, {"a": (1, 3), "c": (0, 1)}),
        ({"include": "a:1@a:3"}, {"a": (1, 3)}),
        ({"exclude": "a:0@b"}, {"a": (1, 2, 3), "c": (0, 1)}),
        ({"exclude": "a:0", "ranks_per_node": 2, "nodes": 2}, {"a": (1, 2), "b": (0, 1)}),
    ],
)
def test_hosts_and_slots_are_chosen(options: dict[str, object], chosen: dict[str, tuple[int, ...]]) -> None:
    assert choose(**options) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "d"}, r"`hosts\.include` = 'd' names 'd', which the hostfile does not list: it lists a, b, c\."),
        ({"exclude": "b:2"}, r"the slots of 'b' are 0 to 1; got '2'"),
        ({"exclude": "b:x"}, r"the slots of 'b' are 0 to 1; got 'x'"),
        ({"exclude": "a@b@c"}, "leaves no host of hosts"),
        ({"nodes": 4}, "between 1 and the 3 hosts of hosts; got 4"),
        ({"include": "a:0", "ranks_per_node": 2}, "more than the 1 slots of the host 'a'"),
    ],
)
def test_hosts_that_are_not_there_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(**options)  # type: ignore[arg-type]


def test_hostfile_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode-2 slots=8\n\nnode-1 slots=4  # the old one\n")
    assert list(read_hostfile(path).items()) == [("node-2", 8), ("node-1", 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("node-1\n", r":1: 'node-1' is not of the form `HOST slots=N`"),
        ("node-1 slots=0\n", r":1: 'node-1 slots=0' is not of the form"),
        ("a slots=1\na slots=2\n", r":2: the host 'a' is listed twice"),
        ("# nobody\n", r"lists no host\. Give it `HOST slots=N` lines"),
    ],
)
def test_wrong_hostfile_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(path)


def test_missing_hostfile_is_no_single_node_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The hostfile '.*nowhere' cannot be read: .*No such file"):
        read_hostfile(tmp_path / "nowhere")
