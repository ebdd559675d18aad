"""Runs `mmscale.train.main` with the words of each request on stdin, one run after the other: the start of a process costs seconds.

A request is a JSON list of words, an answer a JSON list: exit code, stdout, stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

from mmscale.train import main


def serve() -> None:
    """Answer until stdin ends. What libraries print to the file descriptor of stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(json.loads(line))
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")


if __name__ == "__main__":
    serve()
