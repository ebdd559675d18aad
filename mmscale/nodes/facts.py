"""What a node says of itself, so that it can be compared with the others. No torch here: `mmscale preflight` asks hosts over ssh."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmscale.nodes.gpus import Gpu, ask_gpus

PACKAGES = ("mmscale", "torch", "deepspeed", "numpy", "transformers", "pyarrow")
"""Packages whose versions must be the same everywhere."""
FLOORS = ("shards", "mmscale", "launcher")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """A node, as its first rank sees it."""

    python: str
    versions: dict[str, str]
    code: str
    """Digest of this project's sources."""
    shm: int
    """Free bytes of /dev/shm, which worker processes hand batches over in, and NCCL."""
    scratch: int
    """Free bytes of the folder for temporary files, where compiled code is kept."""
    open_files: int
    """Files that a process may have open."""
    unwritable: str | None
    """Why the run folder cannot be written to; None where it can."""
    missing: list[str]
    """Paths that are not there."""
    gpus: list[Gpu]
    no_gpus: str
    """Why there are none."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> NodeFacts:
        """What `dataclasses.asdict` made of one."""
        return cls(**{**record, "gpus": [Gpu(**gpu) for gpu in record["gpus"]]})


def look(run: Path, paths: Sequence[Path]) -> NodeFacts:
    """Look at this node.

    Args:
        run: the run folder.
        paths: what must be there.
    """
    gpus, no_gpus = ask_gpus()
    return NodeFacts(
        python=platform.python_version(),
        versions=versions(),
        code=code_digest(),
        shm=free_bytes(Path("/dev/shm")),
        scratch=free_bytes(Path(tempfile.gettempdir())),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        unwritable=_try_to_write(run),
        missing=[str(path) for path in paths if not path.exists()],
        gpus=gpus,
        no_gpus="" if gpus else no_gpus,
    )


def node_name() -> str:
    """This node, as its scheduler calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def versions() -> dict[str, str]:
    """Package -> its version, or `missing`."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of this project's sources as they lie here: a version number stays the same while somebody works on them."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def free_bytes(folder: Path) -> int:
    """What may still be written to the file system of a folder; 0 where there is none."""
    if not folder.is_dir():
        return 0
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _try_to_write(run: Path) -> str | None:
    path = run / f".node-{node_name()}-{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 4096)
        path.unlink()
    except OSError as e:
        return str(e)
    return None
