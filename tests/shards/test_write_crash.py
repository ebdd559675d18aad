"""SIGKILL before every single step of writing, on one host and on two; then the command is repeated."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.shards.pictures import photo_folder
from tests.shards.test_write_kill import digests

KILLED = -9
DOZEN = 12


@dataclass
class Server:
    """The process that forks writers."""

    process: subprocess.Popen[str]
    notes: Path

    def run(self, *jobs: tuple[list[str], int | None]) -> tuple[list[int], list[list[str]]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([{"words": words, "crash_at": crash_at} for words, crash_at in jobs]) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer["codes"], answer["steps"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    notes = tmp_path_factory.mktemp("notes")
    command = [sys.executable, "-m", "tests.shards.crash", str(notes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Server(process, notes)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = photo_folder(tmp_path_factory.mktemp("in"), 11)
    (folder / "photo3.jpg").write_bytes(b"bad")
    (folder / "photo7.txt").write_text("forbidden")
    limits = ["rows_per_shard=3", "processes=1", "quarantine.max_fraction=0.5", "filter.deny=[forbidden]"]
    return ["source=folder", f"path={folder}", *limits, "tokenizer.kind=wordpiece", "tokenizer.vocab_size=60"]


def crash_and_repeat(server: Server, jobs: list[list[str]], crash_at: list[int], out: Path, whole: dict[str, str]) -> None:
    given = [[*words, f"out={out}"] for words in jobs]
    codes, _ = server.run(*zip(given, crash_at, strict=True))
    assert KILLED in codes
    # at once, as a scheduler does; both hosts again, whichever had died
    codes, _ = server.run(*((words, None) for words in given))
    assert codes == [0] * len(jobs)
    assert digests(out) == whole, crash_at
    assert not list(out.rglob(".*"))


def chosen(steps: list[str], all_of_them: bool) -> list[int]:
    """A dozen steps of different kinds, spread over the run; or all."""
    if all_of_them:
        return list(range(len(steps)))
    first_of_kind = {step: number for number, step in reversed(list(enumerate(steps)))}
    numbers = sorted(first_of_kind.values())
    return sorted({numbers[i * (len(numbers) - 1) // (DOZEN - 1)] for i in range(DOZEN)})


@pytest.fixture(scope="module")
def whole(server: Server, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    codes, steps = server.run(([*words, f"out={out}"], None))
    assert codes == [0]
    found = digests(out)
    assert {"plan.json", "quarantine.jsonl", "filtered.jsonl", "manifest.parquet", "tokenizer/trained_on.json"} <= set(found)
    return found, steps[0]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_before_a_step(
    server: Server, words: list[str], whole: tuple[dict[str, str], list[str]], tmp_path: Path, every: bool
) -> None:
    expected, steps = whole
    kinds = " ".join(steps)
    for name in ("plan.json", "shard-000000.tar", "shard-000000.index", "quarantine.jsonl", "tokenizer.json", "manifest.parquet", "fsync"):
        assert name in kinds
    for crash_at in chosen(steps, every):
        crash_and_repeat(server, [words], [crash_at], tmp_path / f"{crash_at}", expected)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_hosts_killed_before_a_step(
    server: Server, words: list[str], whole: tuple[dict[str, str], list[str]], tmp_path: Path, every: bool
) -> None:
    """Each of two parts dies: the first before step N of its own, the second somewhere else."""
    expected, steps = whole
    jobs = [[*words, f"part={number}/2"] for number in (1, 2)]
    _, counted = server.run(*(([*job, f"out={tmp_path / 'count'}"], None) for job in jobs))
    least = min(map(len, counted))
    for number, crash_at in enumerate(chosen(steps, every)):
        crash = [min(crash_at, least - 4), (crash_at * 7 + number) % (least - 3)]
        crash_and_repeat(server, jobs, crash, tmp_path / f"{number}", expected)


def test_killed_again_and_again(server: Server, words: list[str], whole: tuple[dict[str, str], list[str]], tmp_path: Path) -> None:
    out, crash_at = tmp_path / "out", 3
    codes = [KILLED]
    for _ in range(100):
        codes, _ = server.run(([*words, f"out={out}"], crash_at))
        crash_at += 3
        if codes == [0]:
            break
    assert codes == [0]
    assert digests(out) == whole[0]


def test_one_part_started_twice_at_the_same_time(
    server: Server, words: list[str], whole: tuple[dict[str, str], list[str]], tmp_path: Path
) -> None:
    for trial in range(5):
        out = tmp_path / str(trial)
        codes, _ = server.run(*[([*words, f"out={out}"], None)] * 3)
        assert codes == [0, 0, 0]
        assert digests(out) == whole[0]
