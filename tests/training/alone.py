"""One rank after the other in one process that is started once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

from tests.training.runs import environment

Answer = tuple[int, str, str]
"""Exit code, stdout, stderr."""


class Alone:
    """Calls the per-rank entry point; a process that died is named, with what it said, and replaced."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "alone.log"
        self.process: subprocess.Popen[str] | None = None

    def start(self, *words: object) -> None:
        """Begin a run; `answer` waits for its end."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "tests.training.answer"]
            with self.log.open("a") as log:
                self.process = subprocess.Popen(command, env=environment(), stdin=PIPE, stdout=PIPE, stderr=log, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(w) for w in words]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Answer:
        """Wait for the run that was begun."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process died with {self.process.wait()}:\n{self.log.read_text()[-4000:]}"
        code, out, err = json.loads(line)
        return code, out, err

    def __call__(self, *words: object) -> Answer:
        """Run to the end."""
        self.start(*words)
        return self.answer()

    def signal(self, number: int) -> None:
        """Send a signal to the rank."""
        assert self.process is not None
        self.process.send_signal(number)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()
