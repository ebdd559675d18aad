"""Two real ranks check the node they run on, over a real rendezvous and process group."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import load_run_config
from mmscale.nodes.limits import UNFIT
from mmscale.nodes.reading import read_bytes_s, sample_flops
from mmscale.ports import free_port
from tests.launcher.launching import REPO
from tests.shards.tars import make_data_set
from tests.training.runs import environment


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    make_data_set(tmp_path / "shards")
    path = tmp_path / "stage.yaml"
    path.write_text(
        f"run: {tmp_path / 'run'}\ndata: {{shards: {tmp_path / 'shards'}}}\nobjectives: {{contrastive: {{weight: 1.0}}}}\n"
        "train: {global_batch: 4}\nmodel: tiny\n"
    )
    return path


def check(stage: Path, *options: str, ranks: tuple[int, ...] = (0, 1), port: int | None = None) -> tuple[list[int], str, dict[str, Any]]:
    """Exit codes, what the first rank printed, and nodes.json."""
    there = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "WORLD_SIZE": "2",
        "MMSCALE_LAUNCH_ID": "try",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mmscale.nodes", *options, str(stage)],
            cwd=REPO,
            env=there | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ranks
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    return [process.returncode for process in started], said[0], json.loads((stage.parent / "run" / "nodes.json").read_text())


def failed(record: dict[str, Any]) -> dict[str, str]:
    return {finding["check"]: finding["what"] for finding in record["findings"] if finding["level"] == "fail"}


def test_good_node_passes_and_its_figures_are_on_file(stage: Path) -> None:
    codes, said, record = check(stage)
    assert codes == [0, 0], said
    assert (record["state"], record["launch_id"], record["failed_nodes"]) == ("passed", "try", [])
    assert failed(record) == {}
    assert {finding["check"] for finding in record["findings"]} >= {"ranks", "versions", "gpus", "all_reduce", "storage"}
    assert record["measured"]["all_reduce_gb_s"] > 0.01
    assert "pass  all_reduce" in said


def test_floors_that_are_not_reached_fail(stage: Path) -> None:
    codes, said, record = check(stage, "--all-reduce-gb-s", "1e6", "--read-mb-s", "1e9")
    assert codes == [UNFIT, UNFIT], said
    assert set(failed(record)) == {"all_reduce", "storage"}
    assert record["state"] == "failed"


def test_rank_that_does_not_come_is_named(stage: Path) -> None:
    begun = time.monotonic()
    codes, said, record = check(stage, "--patience-s", "1", "--hosts", "n1:1,n2:1", ranks=(0,))
    assert (codes, failed(record), record["failed_nodes"]) == ([UNFIT], {"ranks": "1 rank of n2 did not come"}, ["n2"]), said
    assert time.monotonic() - begun < 40


def test_port_that_is_taken_is_named(stage: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        codes, said, record = check(stage, "--patience-s", "2", ranks=(0,), port=port)
    assert codes == [UNFIT], said
    assert f"cannot listen at 127.0.0.1:{port}" in failed(record)["port"]


def test_need_of_storage_follows_from_the_model(stage: Path) -> None:
    config = load_run_config(stage)
    assert 1e6 < sample_flops(config) < 1e12
    assert read_bytes_s(config, 3) > 0
