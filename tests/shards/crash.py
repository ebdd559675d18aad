"""A writer that is killed at a chosen step: every write, flush, rename, link and removal of files below its `out` is one.

Run as `python -m tests.shards.crash`: it reads JSON lines `{"words": [...], "crash_at": N or null}` from stdin, writes each in a forked
process, with SIGKILL before the N-th step, and answers with a line `{"code": exit code, "steps": [...]}`.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards import clean_image, configfile  # noqa: F401  (everything is imported once, before the forks)
from shards.config import WriteConfig
from shards.errors import MmscaleError
from shards.tar import TarStream
from shards.write import write_shards


class Steps:
    """Counts the steps, notes them in a file that outlives the process, and kills it before a chosen one."""

    def __init__(self, crash_at: int | None, notes: Path) -> None:
        self._crash_at = crash_at
        self._count = 0
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, what: str) -> None:
        if self._count == self._crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._count += 1
        os.write(self._notes, (what + "\n").encode())


def watch(step: Steps) -> None:
    """Put a step before each system call that changes files."""

    def stepping(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **named: Any) -> Any:
            step(f"{name} {kind_of(arguments)}")
            return function(*arguments, **named)

        return stepped

    for name in ("replace", "rename", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, stepping(name, getattr(os, name)))
    # A killed process loses nothing that it has handed to the system: the disk need not be waited for.
    os.fsync = stepping("fsync", lambda descriptor: None)
    opener = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        opened = opener(file, mode, *arguments, **named)
        if "w" in mode:
            opened.flush()
            step(f"opened {kind_of((file,))}")
        return opened

    io.open = builtins.open = opening  # type: ignore[assignment]
    write = TarStream._write

    def writing(self: TarStream, data: bytes) -> None:
        write(self, data)
        self._file.flush()
        step("wrote a member")

    TarStream._write = writing  # type: ignore[method-assign]


def kind_of(arguments: tuple[Any, ...]) -> str:
    """Name what a call is about, the same in every run: without owners, and `fd` for descriptors."""
    if not arguments or isinstance(arguments[-1], int):
        return "fd"
    name = Path(str(arguments[-1])).name
    return name.split(".tar.")[0] if "-" in name and name.endswith(".tmp") and ".tar." in name else ".".join(name.split(".")[:4])


def run(words: list[str], crash_at: int | None, notes: Path) -> None:
    """Write in this very process."""
    config = configfile.load(WriteConfig, None, words)
    watch(Steps(crash_at, notes))
    try:
        print(write_shards(config, progress=False), file=sys.stderr)
    except MmscaleError as e:
        print(f"mmscale: {e}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Serve jobs; those of one line run at the same time."""
    notes = Path(sys.argv[1])
    for line in sys.stdin:
        jobs = json.loads(line)
        pids = []
        for number, job in enumerate(jobs):
            pid = os.fork()
            if pid == 0:
                run(job["words"], job["crash_at"], notes / f"{number}")
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        steps = [(notes / f"{number}").read_text().splitlines() for number in range(len(jobs))]
        print(json.dumps({"codes": codes, "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
