"""A rank's parent and the launcher's watch over it: signals arrive, ends are told, and neither side outlives the other unknown."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.processes import processes_of_run
from launcher.watch import Watch, own_address
from tests.launcher.launching import wait_for

QUIET = "import time, subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True); print('begun', flush=True)\n"
PROGRAMS = {
    "sleeps": f"{QUIET}time.sleep(600)",
    "stubborn": f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{QUIET}time.sleep(600)",
    "commits": f"import signal\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))\n{QUIET}time.sleep(600)",
    "ends": f"{QUIET}sys.exit(3)",
    "aborts": f"import os\n{QUIET}os.abort()",
}
Started = tuple[Watch, subprocess.Popen[bytes]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "logs" / "ID").mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (tmp_path / f"rank_{name}.py").write_text(text)
    yield tmp_path
    for process in processes_of_run(tmp_path):
        process.kill()


def start_rank(run: Path, program: str, rank: int = 0) -> subprocess.Popen[bytes]:
    env = os.environ | {"MMSCALE_RUN": str(run), "MMSCALE_LAUNCH_ID": "ID", "RANK": str(rank)}
    env["PYTHONPATH"] = f"{run}:{Path(__file__).resolve().parents[2]}"
    return subprocess.Popen([sys.executable, "-m", "launcher.rank", f"rank_{program}"], env=env)


def start(run: Path, program: str, silence_s: float = 30.0, grace_s: float = 10.0) -> Started:
    """A watch and a rank that has begun."""
    watch = Watch(run / "logs" / "ID", "127.0.0.1", silence_s=silence_s, grace_s=grace_s)
    process, log = start_rank(run, program), run / "logs" / "ID" / "rank-0.log"
    look_until(watch, lambda: bool(watch.ranks) and log.exists() and "begun" in log.read_text())
    return watch, process


def look_until(watch: Watch, condition: Callable[[], bool]) -> None:
    def looked() -> bool:
        watch.look(0.05)
        return condition()

    wait_for(looked, 60)


def nothing_left(run: Path) -> bool:
    return list(processes_of_run(run)) == []


@pytest.mark.parametrize(("program", "number", "code"), [("commits", signal.SIGUSR1, 85), ("sleeps", signal.SIGTERM, -15)])
def test_signal_reaches_the_rank_and_its_end_is_told(run: Path, program: str, number: signal.Signals, code: int) -> None:
    watch, process = start(run, program)
    assert [rank.host for rank in watch.alive()] == [os.uname().nodename]
    watch.send(number)
    look_until(watch, lambda: watch.alive() == [])
    assert (watch.ranks[0].code, watch.ranks[0].lost, list(watch.ended())) == (code, False, [0])
    assert process.wait(10) == code
    assert nothing_left(run)
    watch.close()


@pytest.mark.parametrize(("program", "code"), [("ends", 3), ("aborts", -6)])
def test_rank_ends_as_its_program_does_and_leaves_nothing(run: Path, program: str, code: int) -> None:
    watch, process = start(run, program)
    assert process.wait(30) == code
    look_until(watch, lambda: watch.alive() == [])
    assert watch.ranks[0].code == code
    assert nothing_left(run)
    watch.close()


@pytest.mark.parametrize("program", ["sleeps", "stubborn"])
def test_end_of_the_launcher_ends_the_rank(run: Path, program: str) -> None:
    watch, process = start(run, program, grace_s=1.0)
    watch.close()
    assert process.wait(15) == (-9 if program == "stubborn" else -15)
    assert nothing_left(run)
    assert "the launcher is gone: the rank has 1 s to end" in (run / "logs" / "ID" / "rank-0.log").read_text()


def test_silence_of_the_launcher_ends_the_rank(run: Path) -> None:
    watch, process = start(run, "sleeps", silence_s=6.0)
    assert process.wait(60) == -9
    assert nothing_left(run)
    watch.close()


def test_silent_host_is_found(run: Path) -> None:
    watch, process = start(run, "sleeps", silence_s=2.0)
    psutil.Process(process.pid).suspend()
    look_until(watch, lambda: watch.silent() != [])
    assert [rank.rank for rank in watch.silent()] == [0]
    process.kill()
    process.wait()
    look_until(watch, lambda: watch.alive() == [])
    assert watch.ranks[0].lost
    watch.close()


def test_killed_parent_takes_its_rank_along(run: Path) -> None:
    watch, process = start(run, "stubborn")
    process.kill()
    process.wait()
    wait_for(lambda: [p for p in processes_of_run(run) if "rank_stubborn" in p.cmdline()] == [], 10)
    watch.close()


def test_stranger_is_turned_away(run: Path) -> None:
    watch, process = start(run, "sleeps")
    (run / "logs" / "ID" / "watch.json").write_text((run / "logs" / "ID" / "watch.json").read_text().replace(watch.token, "0" * 32))
    stranger = start_rank(run, "sleeps", rank=1)
    look_until(watch, lambda: stranger.poll() is not None)
    assert list(watch.ranks) == [0]
    watch.close()
    process.wait(20)


def test_own_address_is_one_that_the_host_reaches() -> None:
    assert own_address("localhost") == "127.0.0.1"
