"""Ports for ranks to meet at."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mmscale.ports import LOWEST, RANGE, free_port


@pytest.mark.skipif(not RANGE.exists(), reason="no Linux with /proc")
def test_no_port_is_one_that_connections_get() -> None:
    """A connection that begins between the choice and its use must not be able to take it."""
    first, last = map(int, RANGE.read_text().split())
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) > 1
    assert all(LOWEST <= port < 65_536 and not first <= port <= last for port in ports)


def test_a_port_in_use_is_not_given(tmp_path: Path) -> None:
    """The highest one, where no other is outside of what connections get: the kernel chooses then."""
    (tmp_path / "range").write_text(f"{LOWEST}\t65534\n")
    with socket.socket() as used:
        used.bind(("", 65_535))
        used.listen()
        assert free_port(tmp_path / "range") != 65_535
    assert free_port(tmp_path / "range") == 65_535


@pytest.mark.parametrize("said", ["1024\t65535\n", "", None])
def test_where_no_port_is_left_or_none_is_said_it_is_one_of_the_kernels(tmp_path: Path, said: str | None) -> None:
    if said is not None:
        (tmp_path / "range").write_text(said)
    port = free_port(tmp_path / "range")
    with socket.socket() as listener:
        listener.bind(("", port))
