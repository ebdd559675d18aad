"""What a host says of itself, as JSON on one line: `python -m launcher.probe RUN_FOLDER PATH...`. No torch, so it takes a second.

`mmscale preflight` starts it on every host and compares the answers (`launcher.preflight_hosts`).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.machine import this_machine
from mmscale.nodes.facts import code_digest, free_bytes, versions

MARK = ".preflight"
"""A file in the run folder whose content the launching machine has just written: whoever reads it shares the folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A host's answer."""

    host: str
    time: float
    """Its clock, seconds since the epoch, and so those of the machine that reads the answer: the difference is the skew and the way."""
    python: str
    versions: dict[str, str]
    code: str
    """Digest of this project's sources."""
    devices: int | None
    """CUDA devices; None where there are none."""
    cores: int
    memory: int
    """Bytes that are available."""
    shm: int
    """Free bytes of /dev/shm, which worker processes hand batches over in."""
    open_files: int
    """Files that a process may have open."""
    mark: str | None
    """The content of the mark; None where there is none."""
    writable: bool
    """The run folder can be written to."""
    missing: list[str]
    """Paths that are not there."""


def look(run: Path, paths: list[str]) -> Report:
    """Look at this host."""
    import resource

    import psutil

    machine, mark = this_machine(), run / MARK
    return Report(
        host=platform.node(),
        time=time.time(),
        python=platform.python_version(),
        versions=versions(),
        code=code_digest(),
        devices=None if machine.devices is None else len(machine.devices),
        cores=machine.cores,
        memory=psutil.virtual_memory().available,
        shm=free_bytes(Path("/dev/shm")),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        mark=mark.read_text(encoding="utf-8") if mark.is_file() else None,
        writable=run.is_dir() and os.access(run, os.W_OK),
        missing=[path for path in paths if not Path(path).exists()],
    )


if __name__ == "__main__":
    print(json.dumps(asdict(look(Path(sys.argv[1]), sys.argv[2:]))))
