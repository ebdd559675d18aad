"""Plans are pure: the same request, configuration and machine give the same plan and the same command, word for word."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.engines import engine_of
from launcher.machine import Machine
from launcher.plan import LaunchPlan, LaunchRequest, make_plan
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


def plan_for(request: LaunchRequest, machine: Machine, environment: Mapping[str, str] | None = None, **train: int) -> LaunchPlan:
    return make_plan(request, config(**train), machine=machine, environment=environment or {}, launch_id="ID", master_port=29999, here=HERE)


def command(plan: LaunchPlan) -> str:
    return " ".join(engine_of(plan.engine).command(plan))


TAIL = "--enable_each_rank_log /home/ada/project/runs/a/logs/ID --module mmscale.train stage.yaml train.seed=3"


def test_command_for_ranks_on_a_machine_without_devices() -> None:
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS, ranks_per_node=2), LAPTOP)
    assert command(plan) == f"deepspeed --num_accelerators 2 --master_port 29999 --log_level error --no_local_rank {TAIL}"
    assert plan.environment == (
        ("DS_ACCELERATOR", "cpu"),
        ("MMSCALE_LAUNCH_ID", "ID"),
        ("MMSCALE_RUN", "/home/ada/project/runs/a"),
        ("OMP_NUM_THREADS", "4"),
    )


def test_command_takes_every_device_by_default() -> None:
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS), SERVER)
    assert plan.ranks == 4
    assert command(plan).startswith("deepspeed --num_accelerators 4 --master_port 29999 ")
    assert dict(plan.environment)["OMP_NUM_THREADS"] == "16"
    assert "DS_ACCELERATOR" not in dict(plan.environment)


def test_restricted_devices_are_named_because_deepspeed_would_forget_them() -> None:
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS), SHARED_SERVER)
    assert command(plan).startswith("deepspeed --include localhost:2,3 --master_port 29999 ")
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS, ranks_per_node=1), SHARED_SERVER)
    assert command(plan).startswith("deepspeed --include localhost:2 --master_port 29999 ")


def test_command_for_a_hostfile() -> None:
    request = LaunchRequest(arguments=ARGUMENTS, hostfile=Path("hosts"), hosts=HOSTS, nodes=2, ranks_per_node=8, master_address="10.0.0.1")
    plan = plan_for(request, LAPTOP)
    assert plan.hosts == (("node-1", 8), ("node-2", 8))
    assert command(plan) == (
        "deepspeed --hostfile hosts --num_nodes 2 --force_multi --num_accelerators 8 --master_addr 10.0.0.1 --master_port 29999 "
        f"--log_level error --no_local_rank {TAIL}"
    )
    assert engine_of("deepspeed").variables(plan) == {
        "DS_ENV_FILE": "/home/ada/project/runs/a/logs/ID/environment",
        "MMSCALE_LAUNCH_ID": "ID",
        "MMSCALE_RUN": "/home/ada/project/runs/a",
    }


def test_hosts_with_different_slots_keep_them() -> None:
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS, hostfile=Path("hosts"), hosts=HOSTS), LAPTOP, global_batch=200)
    assert plan.ranks == 20
    assert "--num_accelerators" not in command(plan)


def test_command_of_torchrun() -> None:
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS, engine="torchrun", ranks_per_node=2), LAPTOP)
    assert command(plan) == (
        "torchrun --nnodes 1 --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29999 "
        "--log-dir /home/ada/project/runs/a/logs/ID --redirects 3 --module mmscale.train stage.yaml train.seed=3"
    )


def test_what_the_user_has_set_is_left_alone() -> None:
    plan = plan_for(LaunchRequest(arguments=ARGUMENTS, ranks_per_node=2), LAPTOP, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    assert [name for name, _ in plan.environment] == ["MMSCALE_LAUNCH_ID", "MMSCALE_RUN"]


def test_planning_is_pure() -> None:
    request = LaunchRequest(arguments=ARGUMENTS, ranks_per_node=2)
    assert plan_for(request, LAPTOP) == plan_for(request, LAPTOP)


@pytest.mark.parametrize(
    ("request_", "machine", "message"),
    [
        (LaunchRequest(arguments=ARGUMENTS, ranks_per_node=0), LAPTOP, r"`--ranks-per-node` must be at least 1; got 0\."),
        (LaunchRequest(arguments=ARGUMENTS, nodes=2), LAPTOP, r"`--nodes 2` needs a list of the nodes: give --hostfile FILE"),
        (LaunchRequest(arguments=ARGUMENTS, ranks_per_node=5), SERVER, r"`--ranks-per-node 5` is more than the 4 CUDA devices"),
        (
            LaunchRequest(arguments=ARGUMENTS),
            Machine(cores=8, accelerator="cuda", devices=("GPU-12ab",), devices_are_restricted=True),
            r"CUDA_VISIBLE_DEVICES=GPU-12ab names devices otherwise than by index",
        ),
        (
            LaunchRequest(arguments=ARGUMENTS, engine="torchrun", hostfile=Path("hosts"), hosts=HOSTS),
            LAPTOP,
            r"`--engine torchrun` starts ranks on this machine only and takes no --hostfile\.",
        ),
        (
            LaunchRequest(arguments=ARGUMENTS, hostfile=Path("hosts"), hosts=HOSTS, nodes=4),
            LAPTOP,
            r"`--nodes` must be between 1 and the 3 hosts of hosts; got 4\.",
        ),
        (
            LaunchRequest(arguments=ARGUMENTS, hostfile=Path("hosts"), hosts=HOSTS, ranks_per_node=8),
            LAPTOP,
            r"`--ranks-per-node 8` is more than the 4 slots of the host 'node-3' in hosts\.",
        ),
        (LaunchRequest(arguments=ARGUMENTS, ranks_per_node=3), LAPTOP, r"`train\.global_batch` must divide by the ranks, 3; got 64\."),
    ],
)
def test_topology_that_cannot_be_had_is_refused(request_: LaunchRequest, machine: Machine, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_for(request_, machine)
