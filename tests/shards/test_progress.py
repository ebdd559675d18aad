import contextlib
import os
import pty
import sys

import pytest

from shards import progress
from shards.progress import Progress


def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1.0)
    with Progress(10, 2, shown=True) as bar:
        bar.advance(4)
        bar.say("done")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("writing 6 of 10 samples, ")
    assert lines[0].endswith(" s left")
    assert lines[1] == "done"


def test_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1.0)
    with Progress(10, 0, shown=False) as bar:
        bar.advance(4)
        bar.say("done")
    assert capsys.readouterr().err == ""


def test_a_look_at_others_that_have_done_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1.0)
    with Progress(10, 4, shown=True) as bar:
        bar.advance(0)
    assert capsys.readouterr().err == ""


def read_to_the_end(master: int) -> str:
    """What was written to a terminal that is closed now; it may come in several parts."""
    parts = []
    with contextlib.suppress(OSError), os.fdopen(master, "rb", buffering=0) as terminal:  # EIO: nothing is left
        while part := terminal.read(65536):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress(10, 2, shown=True) as bar:
            bar.advance(8)
            bar.say("a line")
    shown = read_to_the_end(master)
    assert "10/10" in shown
    assert "a line" in shown
