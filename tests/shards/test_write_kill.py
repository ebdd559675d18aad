"""Writers that are killed, interrupted or lose a worker."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shards import configfile
from shards.config import WriteConfig
from shards.errors import ShardError
from shards.plan import enter_plan, make_plan
from shards.sources import make_source
from shards.write import write_shards

WORDS = ["source=glyphs", "glyphs.every=30", "rows_per_shard=70", "processes=2", "tokenizer.kind=wordpiece", "tokenizer.vocab_size=400"]
PROGRAM = """
import sys
from shards import configfile
from shards.config import WriteConfig
from shards.write import write_shards
print("ready", flush=True)
print(write_shards(configfile.load(WriteConfig, None, sys.argv[1:])))
"""


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    """Start a writer in a process group of its own and return once it is about to begin."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *WORDS, *words, f"out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for_workers(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        workers = psutil.Process(process.pid).children()
        if len(workers) == count:
            return workers
        time.sleep(0.01)
    raise AssertionError("no workers")


def close(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=60)
    return errors


def test_same_bytes_after_three_kills(tmp_path: Path) -> None:
    started = time.monotonic()
    close(start(tmp_path / "whole"))
    whole_s = time.monotonic() - started
    generator = random.Random(7)
    cut = tmp_path / "cut"
    for _ in range(3):
        process = start(cut)
        time.sleep(generator.uniform(0.1, 0.5) * whole_s)
        os.killpg(process.pid, signal.SIGKILL)
        close(process)
    process = start(cut)
    close(process)
    assert process.returncode == 0
    assert digests(cut) == digests(tmp_path / "whole")
    assert len(list(cut.glob("*.tar"))) == 20


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    workers = wait_for_workers(process, 2)
    process.kill()
    close(process)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_ctrl_c_ends_all_workers_and_leaves_nothing_half_committed(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    workers = wait_for_workers(process, 2)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "out").glob("*.index.arrow")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    errors = close(process)
    assert process.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == 1
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    process = start(tmp_path / "out")
    assert "shards are there already" in close(process)
    assert process.returncode == 0


def test_a_dead_worker_is_named(tmp_path: Path) -> None:
    process = start(tmp_path / "out")
    wait_for_workers(process, 2)[0].kill()
    errors = close(process)
    assert process.returncode == 1
    assert "ShardError: A worker process ended by signal 9 (out of memory? then use fewer `processes`) at 'shard-0000" in errors


def test_an_error_of_a_worker_keeps_its_kind(tmp_path: Path) -> None:
    config = configfile.load(WriteConfig, None, [*WORDS, f"out={tmp_path / 'out'}", "tokenizer.kind=none"])
    enter_plan(tmp_path / "plan", make_plan(config, make_source(config).records()))
    plan = (tmp_path / "plan" / "plan.json").read_bytes()
    (tmp_path / "out" / "shard-000001.tar").mkdir(parents=True)
    (tmp_path / "out" / "plan.json").write_bytes(plan)
    with pytest.raises(ShardError, match=r"Writing the shard 'shard-000001.tar' in .* failed: Is a directory. Mend that and repeat"):
        write_shards(config, progress=False)
