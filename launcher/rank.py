"""The parent of one rank, on whatever host: `python -m launcher.rank MODULE ARGUMENT...`, which deepspeed and torchrun start.

It keeps a connection to the launcher, over which signals come and the rank's end is told. When the connection ends (kill -9 of the
launcher) or says nothing (a network that was cut), it ends the rank. Whatever the rank leaves behind is killed. It loads nothing heavy,
so that it answers however busy the rank is, and it is nobody's Python that hangs when the rank's does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.processes import become_subreaper, kill_descendants

CONNECT_S = 30.0
PR_SET_PDEATHSIG = 1
WATCH = "watch.json"
"""Name of the file in the launch's log folder that tells where the launcher listens."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""DeepSpeed signals every process below its launcher, torchrun the whole group: the rank has got it already."""


@dataclass(slots=True)
class Link:
    """The connection to the launcher, from the rank's side."""

    folder: Path
    rank: int
    silence_s: float = 0.0
    grace_s: float = 0.0
    connection: socket.socket | None = None
    heard: float = 0.0
    """When the launcher was last heard, on the monotonic clock."""
    buffer: bytes = b""
    lines: list[str] = field(default_factory=list)

    def connect(self) -> None:
        """Connect, and say who is here.

        Raises:
            OSError: the launcher cannot be reached.
        """
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                where = json.loads((self.folder / WATCH).read_text(encoding="utf-8"))
                self.silence_s, self.grace_s = where["silence_s"], where["grace_s"]
                self.connection = socket.create_connection((where["address"], where["port"]), timeout=5)
                break
            except ConnectionRefusedError:  # it listens before it starts anything: now it is gone
                raise
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        self.heard = time.monotonic()
        self.say(token=where["token"], rank=self.rank, host=os.uname().nodename, pid=os.getpid())

    def say(self, **record: object) -> None:
        """Tell the launcher something; a connection that is gone is found when it is read."""
        assert self.connection is not None
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(record).encode() + b"\n")

    def read(self) -> bool:
        """Take what came; answers to the launcher's questions go back at once.

        Returns:
            Whether the connection stands.
        """
        assert self.connection is not None
        try:
            content = self.connection.recv(4096)
        except OSError:
            content = b""
        if not content:
            return False
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + content).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return True


def main() -> int:
    """Run the rank to its end and end like it."""
    rank, words = int(os.environ["RANK"]), sys.argv[1:]
    folder = Path(os.environ["MMSCALE_RUN"]) / "logs" / os.environ["MMSCALE_LAUNCH_ID"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    become_subreaper()
    log = (folder / f"rank-{rank}.log").open("ab", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    link = Link(folder, rank)
    parent = os.getppid()
    child = subprocess.Popen([sys.executable, "-u", "-m", *words], preexec_fn=_start_as_child)
    try:
        link.connect()
    except (OSError, ValueError) as e:
        _say(
            f"the launcher cannot be reached from {os.uname().nodename}: {e}. Set `hosts.launcher_address` of the cluster to an address of "
            "the launching machine that this host reaches, and let connections to it through."
        )
        kill_descendants()
        return 1
    code = _follow(child, link, parent)
    link.say(ended=code, time=time.time())
    kill_descendants()
    return _end_like(code)


def _follow(child: subprocess.Popen[bytes], link: Link, parent: int) -> int:
    """Until the rank has ended: pass signals on, and end it when its launcher is gone."""
    assert link.connection is not None
    ends, above = os.pidfd_open(child.pid), os.pidfd_open(parent)
    deadline = float("inf")
    watched = select.poll()
    for descriptor in (ends, above, link.connection.fileno()):
        watched.register(descriptor, select.POLLIN)
    while child.poll() is None:
        ready = {descriptor for descriptor, _ in watched.poll(500)}
        if above in ready or time.monotonic() > deadline:
            child.kill()
        elif deadline == float("inf") and link.connection.fileno() in ready and not link.read():
            _say(f"the launcher is gone: the rank has {link.grace_s:g} s to end.")
            watched.unregister(link.connection.fileno())
            child.terminate()
            deadline = time.monotonic() + link.grace_s
        elif deadline == float("inf") and time.monotonic() - link.heard > link.silence_s:
            _say(f"nothing was heard of the launcher for {link.silence_s:g} s: the rank is ended.")
            deadline = time.monotonic()
        while link.lines:
            _obey(link.lines.pop(0), child, link)
    return child.returncode


def _obey(line: str, child: subprocess.Popen[bytes], link: Link) -> None:
    word = json.loads(line)
    if "signal" in word:
        child.send_signal(word["signal"])
    else:
        link.say(alive=True)


def _start_as_child() -> None:
    """In the rank, before its program: signals as they were, and the end of its parent is its own."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_like(code: int) -> int:
    """Exit as the rank did: by its signal, so that whoever watches sees what it would have seen."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _say(text: str) -> None:
    print(f"mmscale: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
