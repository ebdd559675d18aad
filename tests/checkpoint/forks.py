"""Runs functions on several real processes joined by gloo, forked from one that has imported everything: the imports cost seconds.

Run as `python -m tests.checkpoint.forks`: reads JSON lines {"function": "module:name", "ranks": N, "arguments": {...}} from stdin, calls
`function(**arguments)` on every rank and answers with a line {"codes": [...], "results": [...]}; a rank that died has a null result.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmscale.ports import free_port
from tests.training.runs import environment


class Forks:
    """The test's side of the program."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.checkpoint.forks"]
        self.process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, function: Any, ranks: int, **arguments: Any) -> tuple[list[int], list[Any]]:
        """Call a function of a module on every rank; exit codes and results, in order of rank."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"function": f"{function.__module__}:{function.__name__}", "ranks": ranks, "arguments": arguments}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["codes"], answer["results"]

    def close(self) -> None:
        """End the program."""
        self.process.communicate()


def serve() -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__ = {}
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        module, name = job["function"].split(":")
        function = getattr(importlib.import_module(module), name)
        with tempfile.TemporaryDirectory() as folder:
            port, pids = free_port(), []
            for rank in range(job["ranks"]):
                pid = os.fork()
                if pid == 0:
                    enter(rank, job, function, port, Path(folder) / f"{rank}")
                pids.append(pid)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            files = [Path(folder) / f"{rank}" for rank in range(job["ranks"])]
            results = [json.loads(f.read_text()) if f.exists() else None for f in files]
        os.write(answers, (json.dumps({"codes": codes, "results": results}) + "\n").encode())


def enter(rank: int, job: dict[str, Any], function: Any, port: int, result: Path) -> None:
    """Be a rank; never returns."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    code = 1
    try:
        dist.init_process_group("gloo", rank=rank, world_size=job["ranks"], timeout=timedelta(seconds=60))
        answer = json.dumps(function(**job["arguments"]))
        result.with_suffix(".tmp").write_text(answer)
        result.with_suffix(".tmp").rename(result)
        code = 0
    except BaseException:  # noqa: BLE001  (whatever it is, the process ends)
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    serve()
