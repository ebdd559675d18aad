"""Which rank failed first, told from its output and from when it was last seen alive."""

import io
import os
from pathlib import Path

from launcher.logs import Follower, first_failure, last_words, tail

RAISED = "step 3\nTraceback (most recent call last):\n  ...\nValueError: odd\n"


def write_log(folder: Path, rank: int, text: str, at: float) -> Path:
    path = folder / f"{rank}.log"
    path.write_text(text)
    os.utime(path, (at, at))
    return path


def test_rank_that_raised_first_is_told_from_the_peer_that_lost_it(tmp_path: Path) -> None:
    files = {0: write_log(tmp_path, 0, RAISED, at=100.4), 1: write_log(tmp_path, 1, RAISED, at=100.1)}
    assert first_failure({0: 100.5, 1: 101.2}, files) == 1


def test_killed_rank_says_nothing_and_is_still_found(tmp_path: Path) -> None:
    files = {0: write_log(tmp_path, 0, RAISED, at=100.4), 1: write_log(tmp_path, 1, "step 3\n", at=90.0)}
    assert first_failure({0: 100.9, 1: 100.3}, files) == 1


def test_peers_that_were_told_to_end_come_later(tmp_path: Path) -> None:
    files = {0: write_log(tmp_path, 0, RAISED, at=100.0), 1: write_log(tmp_path, 1, "", at=90.0)}
    assert first_failure({0: 100.2, 1: 101.0}, files) == 0


def test_nobody_has_ended() -> None:
    assert first_failure({}, {}) is None


def test_tail_is_the_last_lines_whatever_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %d\n" % i for i in range(50_000)) + b"\xff end\n")
    assert tail(path, lines=2) == ["line 49999", "\ufffd end"]


def test_last_words_begin_with_the_first_traceback(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("step 1\n" * 100 + RAISED + "".join(f"noise {i}\n" for i in range(60)))
    words = last_words(path)
    assert words[:3] == RAISED.splitlines()[1:]
    assert (words[20], words[-1], len(words)) == ("...", "noise 59", 41)
    assert last_words(tmp_path / "nowhere") == []


def test_follower_copies_what_is_new(tmp_path: Path) -> None:
    to, path = io.BytesIO(), tmp_path / "log"
    follower = Follower(to)
    for text in ("one\ntw", "o\nthree"):
        with path.open("a") as file:
            file.write(text)
        follower.copy([path])
    assert to.getvalue() == b"one\ntwo\nthree"
