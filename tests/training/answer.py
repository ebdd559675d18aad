"""Runs `mmscale.train.main` with the words of each request on stdin, each in a fork of its own: the imports cost seconds.

A request is a JSON list of words, an answer a JSON list: exit code, stdout, stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

import deepspeed  # noqa: F401  (imported before the forks, for their sake)

from mmscale.train import main


def serve() -> None:
    """Answer until stdin ends. What libraries print to the file descriptor of stdout goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer(json.loads(line), answers)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"the run died: {os.waitstatus_to_exitcode(status)}")


def answer(words: list[str], answers: int) -> None:
    """Run, answer and end this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    with os.fdopen(answers, "w") as stream:
        stream.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
    os._exit(0)


if __name__ == "__main__":
    serve()
