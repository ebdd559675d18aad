"""One rank after the other, from one process that has imported everything."""

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
    """Calls the per-rank entry point; a run that died is shown with what it said."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "alone.log"
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, *words: object) -> Answer:
        """Run to the end."""
        if self.process is None:
            command = [sys.executable, "-m", "tests.training.answer"]
            with self.log.open("w") as log:
                self.process = subprocess.Popen(command, env=environment(), stdin=PIPE, stdout=PIPE, stderr=log, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(w) for w in words]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise AssertionError(self.log.read_text()[-4000:])
        code, out, err = json.loads(line)
        return code, out, err

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate()
            self.process = None
