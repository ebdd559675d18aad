"""What a plan needs to know of this machine: cores and accelerators. Found without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OTHER_ACCELERATORS = ("kfd", "accel", "davinci_manager", "dxg")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The node that the launcher runs on."""

    cores: int
    """Cores this process may use."""
    accelerator: Literal["cuda", "cpu", "other"]
    """other: a device file of another vendor is there, and DeepSpeed is left to find out which."""
    devices: tuple[str, ...] | None = None
    """cuda: what CUDA_VISIBLE_DEVICES lists, or every index; other: None."""
    devices_are_restricted: bool = False
    """CUDA_VISIBLE_DEVICES is set."""


def this_machine(device_files: Path = Path("/dev")) -> Machine:
    """Look at the device files and the environment (CUDA_VISIBLE_DEVICES, DS_ACCELERATOR)."""
    cores = len(os.sched_getaffinity(0))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return Machine(cores=cores, accelerator="cpu")
    if any((device_files / name).exists() for name in OTHER_ACCELERATORS):
        return Machine(cores=cores, accelerator="other")
    found = sorted(int(p.name.removeprefix("nvidia")) for p in device_files.glob("nvidia*") if p.name.removeprefix("nvidia").isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or visible in ("", "-1"):
        return Machine(cores=cores, accelerator="cpu")
    devices = tuple(map(str, found)) if visible is None else tuple(name.strip() for name in visible.split(",") if name.strip())
    return Machine(cores=cores, accelerator="cuda", devices=devices, devices_are_restricted=visible is not None)
