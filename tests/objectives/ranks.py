"""Runs a function on several real processes joined by gloo, and gives back what each returned."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from mmscale.ports import free_port


def run_ranks(function: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Call `function(rank, ranks, *args)` in `ranks` processes; its results in order of rank."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.model.tiny"])  # imports once for all tests
    arguments = (function, ranks, free_port(), str(folder), args)
    torch.multiprocessing.start_processes(_enter, arguments, nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter(rank: int, function: Callable[..., Any], ranks: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, ranks, *args), Path(folder) / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()
