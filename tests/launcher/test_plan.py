"""Plans are pure: the same request, configuration and machine give the same plan and the same command, word for word."""

import argparse
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner

from launcher.cluster import ChecksConfig, ClusterConfig, EngineName, HostsConfig, load_cluster, time_limit_s
from launcher.engines import engine_of, slurm
from launcher.machine import Machine
from launcher.plan import Launcher, LaunchPlan, LaunchRequest, make_plan
from launcher.start import describe
from mmscale.config import DataConfig, RunConfig, TrainConfig
from mmscale.objectives_config import ObjectiveConfig, ObjectivesConfig
from shards.errors import ConfigError

HERE = Path("/home/ada/project")
LAPTOP = Machine(cores=8, accelerator="cpu")
SERVER = Machine(cores=64, accelerator="cuda", devices=("0", "1", "2", "3"))
SHARED_SERVER = Machine(cores=64, accelerator="cuda", devices=("2", "3"), devices_are_restricted=True)
ARGUMENTS = ("stage.yaml", "train.seed=3")
HOSTS = {"node-1": 8, "node-2": 8, "node-3": 4}


def config(**train: int) -> RunConfig:
    return RunConfig(
        run="runs/a",
        data=DataConfig(shards="data/a"),
        objectives=ObjectivesConfig(contrastive=ObjectiveConfig(weight=1.0)),
        train=TrainConfig(**({"global_batch": 64} | train)),  # type: ignore[arg-type]
    )


def request(engine: EngineName = "deepspeed", hosts: Mapping[str, int] | None = None, **cluster: Any) -> LaunchRequest:
    where = HostsConfig(hostfile=None if hosts is None else "hosts", **cluster.pop("reached", {}))
    return LaunchRequest(arguments=ARGUMENTS, cluster=ClusterConfig(engine=engine, hosts=where, **cluster), hosts=hosts)


def plan_for(request: LaunchRequest, machine: Machine, environment: Mapping[str, str] | None = None, **train: int) -> LaunchPlan:
    launcher = Launcher(machine=machine, environment=environment or {}, here=HERE, python="/opt/python", launch_id="ID", port=29999)
    return make_plan(request, config(**train), launcher)


def command(plan: LaunchPlan) -> str:
    return " ".join(engine_of(plan.engine).command(plan))


TAIL = "--log_level error --no_local_rank --module launcher.rank mmscale.train stage.yaml train.seed=3"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("local-deepspeed", request(ranks_per_node=2)),
        ("local-torchrun", request("torchrun", ranks_per_node=2)),
        ("hosts-deepspeed", request(hosts=HOSTS, nodes=2, reached={"exclude": "node-1:0", "master_address": "10.0.0.1"}, ranks_per_node=4)),
        ("hosts-torchrun", request("torchrun", HOSTS, ranks_per_node=4, environment={"NCCL_DEBUG": "WARN"}, reached={"exclude": "node-1"})),
        ("slurm", LaunchRequest(arguments=ARGUMENTS, cluster=load_cluster("slurm", ["setup=[module load cuda]", "slurm.partition=long"]))),
    ],
)
def test_plan_word_for_word(name: str, asked: LaunchRequest) -> None:
    """The whole of what a dry run prints; after a wanted change, write it anew: MMSCALE_WRITE_GOLDEN=1."""
    travelled = {"NCCL_SOCKET_IFNAME": "ib0", "HOME": "/home/ada", "AWS_SECRET_ACCESS_KEY": "secret"}
    shown = describe(plan_for(asked, LAPTOP, travelled)) + "\n"
    path = Path(__file__).with_name("golden") / f"{name}.txt"
    if "MMSCALE_WRITE_GOLDEN" in os.environ:
        path.write_text(shown)
    assert shown == path.read_text()
    assert "secret" not in shown


def test_script_of_slurm_is_a_script(tmp_path: Path) -> None:
    text = slurm.script(plan_for(LaunchRequest(arguments=ARGUMENTS, cluster=load_cluster("slurm")), LAPTOP))
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
    assert re.search(r"@[A-Z_]+@", text) is None


def test_command_takes_every_device_by_default() -> None:
    plan = plan_for(request(), SERVER)
    assert plan.ranks == 4
    assert command(plan).startswith("deepspeed --num_accelerators 4 --master_port 29999 ")
    assert dict(plan.environment)["OMP_NUM_THREADS"] == "16"
    assert "DS_ACCELERATOR" not in dict(plan.environment)


def test_restricted_devices_are_named_because_deepspeed_would_forget_them() -> None:
    plan = plan_for(request(), SHARED_SERVER)
    assert command(plan).startswith("deepspeed --include localhost:2,3 --master_port 29999 ")
    plan = plan_for(request(ranks_per_node=1), SHARED_SERVER)
    assert command(plan).startswith("deepspeed --include localhost:2 --master_port 29999 ")


def test_hosts_with_different_slots_keep_them() -> None:
    plan = plan_for(request(hosts=HOSTS), LAPTOP, global_batch=200)
    assert plan.ranks == 20
    assert command(plan) == f"deepspeed --hostfile /home/ada/project/runs/a/logs/ID/hostfile --force_multi --master_port 29999 {TAIL}"
    with pytest.raises(ConfigError, match=r"the hosts chosen have different slots: node-1 8, node-2 8, node-3 4\. Give --ranks-per-node"):
        command(plan_for(request("torchrun", HOSTS), LAPTOP, global_batch=200))


@pytest.mark.parametrize(("engine", "options"), [("deepspeed", "--hosts node-1:8,node-2:8 "), ("torchrun", "")])
def test_check_of_the_nodes_is_the_same_launch_of_another_program(engine: EngineName, options: str) -> None:
    plan = plan_for(request(engine, HOSTS, nodes=2, checks=ChecksConfig(read_mb_s=200)), LAPTOP)
    assert plan.checks_nodes
    check = command(plan.of_check()).replace("ID/nodes", "ID").replace("ID-nodes", "ID")
    assert check.replace(f"mmscale.nodes --read-mb-s 200 {options}", "mmscale.train ") == command(plan)


def test_nodes_are_checked_where_there_are_several_or_where_it_is_asked_for() -> None:
    assert not plan_for(request(ranks_per_node=2), LAPTOP).checks_nodes
    assert plan_for(request(ranks_per_node=2, checks=ChecksConfig(run=True)), LAPTOP).checks_nodes
    assert plan_for(request("slurm", nodes=2), LAPTOP).checks_nodes
    assert not plan_for(request("slurm", nodes=2, checks=ChecksConfig(run=False)), LAPTOP).checks_nodes


def test_what_the_user_has_set_is_left_alone() -> None:
    plan = plan_for(request(ranks_per_node=2), LAPTOP, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert [name for name, _ in plan.environment] == ["MMSCALE_LAUNCH_ID", "MMSCALE_RUN"]


def test_planning_is_pure() -> None:
    assert plan_for(request(ranks_per_node=2), LAPTOP) == plan_for(request(ranks_per_node=2), LAPTOP)


@pytest.mark.parametrize(
    ("request_", "machine", "message"),
    [
        (request(nodes=2), LAPTOP, r"2 nodes need a list of the nodes: give --hostfile FILE"),
        (request(ranks_per_node=5), SERVER, r"`--ranks-per-node 5` is more than the 4 CUDA devices"),
        (
            request(),
            Machine(cores=8, accelerator="cuda", devices=("GPU-12ab",), devices_are_restricted=True),
            r"CUDA_VISIBLE_DEVICES=GPU-12ab names devices otherwise than by index",
        ),
        (request(hosts=HOSTS, nodes=4), LAPTOP, r"`--nodes` must be between 1 and the 3 hosts of hosts; got 4\."),
        (
            request(hosts=HOSTS, ranks_per_node=8),
            LAPTOP,
            r"`--ranks-per-node 8` is more than the 4 slots of the host 'node-3' in hosts\.",
        ),
        (request(ranks_per_node=3), LAPTOP, r"`train\.global_batch` must divide by the ranks, 3; got 64\."),
        (request("slurm", nodes=3, ranks_per_node=5), LAPTOP, r"must divide by the ranks, 15; got 64\."),
    ],
)
def test_topology_that_cannot_be_had_is_refused(request_: LaunchRequest, machine: Machine, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_for(request_, machine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ranks_per_node=0"], r"`ranks_per_node` of the cluster must be at least 1 or null; got 0\."),
        (["hosts.exclude=a"], r"choose among the hosts of a hostfile: set `hosts\.hostfile`"),
        (["hosts.hostfile=h", "hosts.include=a", "hosts.exclude=a"], "not both"),
        (["engine=slurm", "hosts.hostfile=h"], "gets its hosts from SLURM"),
        (["setup=[module load cuda]"], "`setup` is for `engine: slurm`"),
        (["hosts.silence_s=1"], r"`hosts\.silence_s` must be at least 5 s"),
        (["environment={A B: c}"], "'A B' is no name of a variable"),
        (["slurm.time=tomorrow"], r"`slurm\.time` must be minutes, HH:MM:SS or D-HH:MM:SS"),
        (["slurm.time='4'"], r"between 0 and the time limit `slurm\.time` = 4 \(240 s\); got 300"),
        (["slurm.restarts=0"], r"`slurm\.restarts` must be at least 1"),
        (["slurm.options=[exclusive]"], "options that begin with `-`; got 'exclusive'"),
        (["slurm.partitoin=long"], "partitoin"),
        (["checks.clock_s=0"], r"`checks\.clock_s` of the cluster must be above 0; got 0"),
        (["engine=mpi"], "engine"),
    ],
)
def test_cluster_that_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster(None, words)


@pytest.mark.parametrize("name", ["local", "hosts", "slurm"])
def test_cluster_files_that_come_along_load(name: str) -> None:
    load_cluster(name)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 1800), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-02:03", 93780), ("1-2:3:4", 93784)]
)
def test_time_as_slurm_writes_it(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


def test_words_arrive_on_other_hosts_as_they_are() -> None:
    """What DeepSpeed makes of them for pdsh goes through a shell."""
    words = (
        *("run=r", "optimizer.freeze=[(text|image)_layers]", r"lora.targets=\w+_layers\..*\.(qkv|out)", "data.shards=[{path:a},{path:b}]"),
        *("x=$HOME/a b", 'y=a "q" b`id`', "z=it's", "u=it's a", "s3://b?x=1&y=2", r"w=\w (a)", "data.keep={image:0.5,sound:1}"),
    )
    asked = LaunchRequest(arguments=(*ARGUMENTS, *words), cluster=load_cluster(None, ["hosts.hostfile=h"]), hosts=HOSTS)
    plan = plan_for(asked, LAPTOP, global_batch=200)
    made = engine_of("deepspeed").command(plan)
    arguments = argparse.Namespace(user_args=made[made.index(plan.module) + 1 :], user_script="x")
    sent = " ".join(PDSHRunner(arguments, "").user_arguments)
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {sent}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(plan.arguments)
    assert engine_of("deepspeed").command(plan_for(LaunchRequest(arguments=(*ARGUMENTS, *words)), LAPTOP))[-1] == words[-1]


def test_a_script_of_a_folder_with_a_blank_is_read_by_sbatch() -> None:
    plan = replace(plan_for(LaunchRequest(arguments=ARGUMENTS, cluster=load_cluster("slurm")), LAPTOP), run=HERE / "my run")
    found = [line for line in slurm.script(plan).splitlines() if "my run" in line and line.startswith("#SBATCH")]
    assert found == ['#SBATCH --job-name="my run"', f'#SBATCH --output="{plan.run}/job-%j.log"']
