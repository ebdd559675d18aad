"""Each planted fault of a node is found, with its fix, and put down to the right node; nothing is found where nothing is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmscale.finding import Finding, failed_nodes, render
from mmscale.nodes.facts import NodeFacts, code_digest, look, versions
from mmscale.nodes.gpus import Gpu, ask_gpus, read_answer, visible
from mmscale.nodes.judge import RankReport, judge_nodes
from mmscale.nodes.limits import NodeLimits, parse
from mmscale.nodes.measure import ring_rounds, slow_nodes
from mmscale.nodes.verdict import Measured, judge_measured
from shards.errors import ConfigError

ANSWER = """0, GPU-aa, NVIDIA H100 80GB HBM3, 550.54.15, 1, 0, No
1, GPU-ab, NVIDIA H100 80GB HBM3, 550.54.15, 4, 0, No
"""
GPUS = read_answer(ANSWER)
GOOD = NodeFacts(
    python="3.11.7",
    versions={"mmscale": "0.1.0", "torch": "2.13", "deepspeed": "0.19.8"},
    code="0123456789ab",
    shm=2**34,
    scratch=2**36,
    open_files=65536,
    unwritable=None,
    missing=[],
    gpus=GPUS,
    no_gpus="",
)
NODES = ("n1", "n2", "n3")
HOSTS = tuple(node for node in NODES for _ in range(2))


def reports(facts: Mapping[str, NodeFacts], **changes: Any) -> list[RankReport]:
    """Two ranks on each of three nodes; `changes` are of the ranks of n2."""
    return [
        replace(
            RankReport(rank=rank, node=node, device="cuda", devices=2, facts=facts.get(node, GOOD) if rank % 2 == 0 else None),
            **(changes if node == "n2" else {}),
        )
        for rank, node in enumerate(HOSTS)
    ]


def bad(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.level in ("fail", "warn")]


@pytest.mark.parametrize(
    ("change", "check", "level", "what", "fix"),
    [
        ({"python": "3.12.1"}, "versions", "fail", "n2 has Python 3.12.1, the others 3.11.7", "constraints.txt"),
        ({"versions": GOOD.versions | {"torch": "2.12"}}, "versions", "fail", "n2 has torch 2.12, the others 2.13", "constraints.txt"),
        ({"code": "ffff"}, "code", "fail", "n2 has other sources of mmscale (digest ffff)", "the same commit"),
        ({"unwritable": "[Errno 30] Read-only file system"}, "run_folder", "fail", "n2 cannot write: [Errno 30] Read-only", "its mount"),
        ({"missing": ["/data/x"]}, "paths", "fail", "n2 has no /data/x", "Mount it there"),
        ({"shm": 2**20}, "shm", "fail", "n2 has 1 MiB free in /dev/shm", "--shm-size"),
        ({"shm": 2**26}, "shm", "warn", "n2 has 64 MiB free in /dev/shm", "--shm-size"),
        ({"scratch": 2**28}, "scratch", "warn", "n2 has 256 MiB free for temporary files", "TMPDIR"),
        ({"scratch": 0}, "scratch", "fail", "n2 has 0 MiB free for temporary files", "TMPDIR"),
        ({"open_files": 1024}, "limits", "warn", "a process on n2 may open 1024 files", "ulimit"),
        ({"gpus": [replace(gpu, driver="535.1") for gpu in GPUS]}, "driver", "warn", "n2 has the NVIDIA driver 535.1", "same driver"),
        ({"gpus": [GPUS[0]]}, "gpus", "fail", "n2 shows 1 devices, the others 2", "dmesg"),
        (
            {"gpus": [], "no_gpus": "nvidia-smi ended with 9: failed"},
            "gpus",
            "fail",
            "n2 shows 0 devices, the others 2: nvidia-smi",
            "dmesg",
        ),
        ({"gpus": [GPUS[0], replace(GPUS[1], uncorrected=3)]}, "gpus", "fail", "GPU 1 of n2 has 3 memory errors", "reset the device"),
        ({"gpus": [replace(GPUS[0], retiring=True), GPUS[1]]}, "gpus", "fail", "memory that waits to be retired", "reset the device"),
        (
            {"gpus": [replace(GPUS[0], used_mib=40_000), GPUS[1]]},
            "gpus",
            "fail",
            "40,000 MiB of GPU 0 of n2 are in use",
            "nvidia-smi names",
        ),
    ],
)
def test_fault_of_a_node_is_found_and_named(change: dict[str, Any], check: str, level: str, what: str, fix: str) -> None:
    found = bad(judge_nodes(reports({"n2": replace(GOOD, **change)}), 6, HOSTS))
    assert [(f.check, f.level, f.node) for f in found] == [(check, level, "n2")]
    assert what in found[0].what
    assert fix in found[0].fix
    assert failed_nodes(found) == (["n2"] if level == "fail" else [])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"device": "cpu", "devices": 0}, "2 of 2 ranks of n2 would compute on cpu, the others on cuda"),
        ({"devices": 0}, ""),
        ({"devices": 1}, ""),  # SLURM may show each rank its own device alone
    ],
)
def test_ranks_compute_alike(change: dict[str, Any], what: str) -> None:
    found = bad(judge_nodes(reports({}, **change), 6, HOSTS))
    assert [(f.check, f.node, f.what) for f in found] == ([("devices", "n2", what)] if what else [])


def test_more_ranks_than_devices_are_found() -> None:
    many = [replace(report, node="n1", devices=4) for report in reports({})]
    found = bad(judge_nodes(many, 6, ()))
    assert [(f.check, f.what) for f in found] == [("devices", "n1 has 4 devices for 6 ranks")]


@pytest.mark.parametrize(
    ("hosts", "what", "node"), [(HOSTS, ["2 ranks of n2 did not come"], ["n2"]), ((), ["rank 2 did not come", "rank 3 did not come"], [])]
)
def test_ranks_that_did_not_come_are_named(hosts: tuple[str, ...], what: list[str], node: list[str]) -> None:
    found = bad(judge_nodes([report for report in reports({}) if report.node != "n2"], 6, hosts))
    assert [f.what for f in found] == what
    assert failed_nodes(found) == node


def test_good_nodes_have_no_finding() -> None:
    found = judge_nodes(reports({}), 6, HOSTS)
    assert [(f.check, f.level) for f in found] == [(name, "pass") for name in ("ranks", "versions", "room", "gpus")]
    assert "2 x NVIDIA H100 80GB HBM3 a node" in found[-1].what
    none = replace(GOOD, gpus=[], no_gpus="there is no nvidia-smi")
    found = judge_nodes(reports(dict.fromkeys(NODES, none)), 6, HOSTS)
    assert [(f.level, f.what) for f in found if f.check == "gpus"] == [("skip", "there is no nvidia-smi")]
    assert render(found).endswith("0 would fail, 0 to look at, 3 good, 1 not looked at")


def measured(**changes: Any) -> Measured:
    values: dict[str, Any] = {
        "ranks": 6,
        "nodes": NODES,
        "clocks": {"n1": 0.0, "n2": 0.01, "n3": -0.02},
        "all_reduce_gb_s": 5.0,
        "exchanges_gb_s": {(0, 1): 6.0, (1, 2): 5.0, (2, 0): 5.5},
        "reads_mb_s": {"n1": 500.0, "n2": 450.0, "n3": 480.0},
    }
    return Measured(**(values | changes))


LINK_OF_N2 = {(0, 1): 0.5, (1, 2): 0.4, (2, 0): 5.5}


@pytest.mark.parametrize(
    ("change", "limits", "expected"),
    [
        ({}, {}, []),
        ({}, {"all_reduce_gb_s": 4.0, "read_mb_s": 400.0}, []),
        ({"needed_mb_s": 300.0, "needed_from": "as the run has taken"}, {}, []),
        ({"clocks": {"n1": 0.0, "n2": 42.0, "n3": 0.1}}, {}, [("clocks", "fail", "n2", "41.9 s ahead of the others'")]),
        ({"clocks": {"n1": 0.0, "n2": -42.0, "n3": -42.1}}, {}, [("clocks", "fail", "n1", "42.0 s ahead of the others'")]),
        ({}, {"clock_s": 0.005}, [("clocks", "fail", "n2", "0.0 s ahead"), ("clocks", "fail", "n3", "0.0 s behind")]),
        ({}, {"all_reduce_gb_s": 20.0}, [("all_reduce", "fail", None, r"less than checks\.all_reduce_gb_s = 20")]),
        ({"exchanges_gb_s": LINK_OF_N2}, {}, [("exchange", "warn", "n2", "exchanges 0.5 GB/s with its neighbours, others up to 5.5")]),
        (
            {"exchanges_gb_s": LINK_OF_N2, "all_reduce_gb_s": 0.3},
            {"all_reduce_gb_s": 4.0},
            [("exchange", "fail", "n2", "exchanges 0.5"), ("all_reduce", "fail", None, "0.3 GB/s bus bandwidth")],
        ),
        ({"reads_mb_s": {"n1": 500.0, "n2": 50.0, "n3": 480.0}}, {"read_mb_s": 400.0}, [("storage", "fail", "n2", "n2 reads 50.0 MB/s")]),
        (
            {"needed_mb_s": 470.0, "needed_from": "as the run has taken"},
            {},
            [("storage", "warn", "n2", "less than the 470.0 that a node needs as the run has taken")],
        ),
        ({"unread": {"n3": "no such bucket"}}, {}, [("storage", "fail", "n3", "n3 cannot read shards: no such bucket")]),
    ],
)
def test_what_was_measured_is_judged(change: dict[str, Any], limits: dict[str, float], expected: list[tuple[Any, ...]]) -> None:
    found = bad(judge_measured(measured(**change), NodeLimits(**limits)))
    assert [(f.check, f.level, f.node) for f in found] == [line[:3] for line in expected]
    assert all(re.search(line[3], f.what) for f, line in zip(found, expected, strict=True)), found
    assert all(f.fix for f in found)


def test_of_two_clocks_none_is_blamed() -> None:
    two = measured(nodes=("n1", "n2"), clocks={"n1": 0.0, "n2": -42.0}, exchanges_gb_s={(0, 1): 6.0})
    found = bad(judge_measured(two, NodeLimits()))
    assert [(f.check, f.what, f.node) for f in found] == [("clocks", "the clocks of n1 and n2 are 42.0 s apart", None)]


def test_one_rank_has_nothing_to_exchange() -> None:
    found = judge_measured(Measured(ranks=1, nodes=("n1",), clocks={"n1": 0.0}), NodeLimits())
    assert [(f.check, f.level) for f in found] == [("all_reduce", "skip")]


@pytest.mark.parametrize(("nodes", "rounds"), [(1, 0), (2, 1), (3, 3), (4, 2), (5, 3), (16, 2)])
def test_neighbours_of_the_ring_meet_once_and_one_at_a_time(nodes: int, rounds: int) -> None:
    parted = ring_rounds(nodes)
    assert len(parted) == rounds
    for pairs in parted:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
    met = [tuple(sorted(pair)) for pairs in parted for pair in pairs]
    assert sorted(met) == sorted({tuple(sorted((node, (node + 1) % nodes))) for node in range(nodes)} if nodes > 1 else [])


def test_of_two_nodes_none_is_blamed() -> None:
    assert slow_nodes(["a", "b"], {(0, 1): 0.001}) == {}


def test_devices_are_those_that_are_visible() -> None:
    first = Gpu(index=0, uuid="GPU-aa", name="NVIDIA H100 80GB HBM3", driver="550.54.15", used_mib=1, uncorrected=0, retiring=False)
    assert GPUS[0] == first
    assert [gpu.index for gpu in visible(GPUS, None)] == [0, 1]
    assert [gpu.index for gpu in visible(GPUS, "1")] == [1]
    assert [gpu.index for gpu in visible(GPUS, "GPU-aa")] == [0]
    assert visible(GPUS, "") == []
    odd = read_answer("0, GPU-c, NVIDIA GeForce RTX 4090, 550.54.15, [N/A], [N/A], [N/A]\n")[0]
    assert (odd.used_mib, odd.uncorrected, odd.retiring) == (0, None, False)


@pytest.mark.gpu
def test_device_here_is_seen() -> None:
    gpus, _ = ask_gpus()
    assert gpus
    assert all(gpu.uuid.startswith(("GPU-", "MIG-")) and gpu.name for gpu in gpus)


def test_node_looks_at_itself(tmp_path: Path) -> None:
    facts = look(tmp_path / "run", [tmp_path, tmp_path / "nowhere"])
    assert facts.missing == [str(tmp_path / "nowhere")]
    assert (facts.unwritable, list((tmp_path / "run").iterdir())) == (None, [])
    assert facts.code == code_digest()
    assert facts.versions == versions()
    assert bool(facts.gpus) != bool(facts.no_gpus)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in str(look(tmp_path / "file" / "run", []).unwritable)


def test_words_of_the_check() -> None:
    limits = NodeLimits(all_reduce_gb_s=12.5, clock_s=1)
    assert limits.options() == ["--all-reduce-gb-s", "12.5", "--clock-s", "1"]
    asked = parse(["--hosts", "a:2,b:1", *limits.options(), "stage.yaml", "train.steps=3"])
    assert (asked.limits, asked.hosts, asked.words) == (limits, ("a", "a", "b"), ("stage.yaml", "train.steps=3"))
    with pytest.raises(ConfigError, match=r"`checks\.patience_s` of the cluster must be above 0; got -1"):
        parse(["--patience-s", "-1", "stage.yaml"])
