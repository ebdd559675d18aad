"""The NVIDIA devices of this node, asked of nvidia-smi: it answers without touching them, so what is in use is others'."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

FIELDS = ("index", "uuid", "name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
ANSWER_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device."""

    index: int
    uuid: str
    name: str
    driver: str
    used_mib: int
    """Memory in use."""
    uncorrected: int | None
    """Memory errors since the driver was loaded that ECC could not correct; None where the device does not count them."""
    retiring: bool
    """A page waits for a reset to be retired."""


def ask_gpus() -> tuple[list[Gpu], str]:
    """Ask for the devices that CUDA_VISIBLE_DEVICES leaves visible.

    Returns:
        The devices, and why there are none.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "there is no nvidia-smi"
    words = [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi has not answered for {ANSWER_S:g} s"
    if done.returncode != 0:
        return [], f"nvidia-smi ended with {done.returncode}: {' '.join((done.stdout + done.stderr).split())}"
    return visible(read_answer(done.stdout), os.environ.get("CUDA_VISIBLE_DEVICES")), "nvidia-smi lists no device"


def read_answer(text: str) -> list[Gpu]:
    """Read what nvidia-smi prints for FIELDS; what a device does not know is `[N/A]` or the like. Pure."""
    gpus = []
    for line in text.splitlines():
        index, uuid, name, driver, used, uncorrected, retiring = (word.strip() for word in line.split(","))
        gpus.append(
            Gpu(
                index=int(index),
                uuid=uuid,
                name=name,
                driver=driver,
                used_mib=int(used) if used.isdigit() else 0,
                uncorrected=int(uncorrected) if uncorrected.isdigit() else None,
                retiring=retiring == "Yes",
            )
        )
    return gpus


def visible(gpus: list[Gpu], variable: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or by (the beginning of) their UUID; all where it is not set. Pure."""
    if variable is None:
        return gpus
    names = [name.strip() for name in variable.split(",") if name.strip()]
    return [gpu for gpu in gpus if any(name == str(gpu.index) or (not name.isdigit() and gpu.uuid.startswith(name)) for name in names)]
