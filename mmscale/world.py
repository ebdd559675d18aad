"""Who this process is among its peers: a frozen value, read once from the standard variables."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mmscale.errors import TopologyError
from mmscale.ports import free_port


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Rank, size and device of this process."""

    rank: int
    """Rank in [0, size)."""
    size: int
    """Number of ranks of the run."""
    local_rank: int
    """Rank among the processes of this host."""
    device: torch.device
    """Where this rank computes."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what the run writes once."""
        return self.rank == 0


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """Read rank, size and local rank from torchrun's and deepspeed's variables, or SLURM's, or take one rank.

    Raises:
        TopologyError: the variables contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        local_rank = int(environment.get("SLURM_LOCALID", "0"))
    else:
        rank, size, local_rank = 0, 1, 0
    if not 0 <= rank < size:
        raise TopologyError(f"RANK must lie in [0, WORLD_SIZE); got RANK={rank}, WORLD_SIZE={size}. Check the launcher's environment.")
    return World(rank=rank, size=size, local_rank=local_rank, device=_device(local_rank))


def connect(world: World, timeout_s: float) -> dist.ProcessGroup:
    """Join the process group of the run (all ranks call) and a second one, on gloo, for control messages.

    Returns:
        The gloo group: object gathers of the checkpoint protocol and of evaluation go over it, never over the
        accelerator's communicator.
    """
    import deepspeed  # takes seconds to import: not for those who only read `World`

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would probe all its optional kernels and, on CPUs, compile a shared-memory all-reduce at the first start: that needs a
    # compiler on every host, and a start killed meanwhile leaves a lock that later starts wait for without a word. None of them is used.
    deepspeed.ops.__compatible_ops__ = {}
    fill_environment(world)
    timeout = timedelta(seconds=timeout_s)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `fp32` or `bf16` into a dtype; `auto` is bf16 only where the device multiplies it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # SLURM may show each task only its own device, which then has index 0
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def fill_environment(world: World) -> None:
    """Give torch's env:// rendezvous what SLURM or a single process does not set."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise TopologyError(
                f"{name} is not set, yet the run has {world.size} ranks. Start it with deepspeed or torchrun, "
                "or export MASTER_ADDR (the first host) and MASTER_PORT (a free port) in the SLURM script."
            )


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
