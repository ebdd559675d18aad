"""Progress on stderr: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 10.0


class Progress:
    """Counts samples up to a total; silent if not `shown`. `doing` is the word in front."""

    def __init__(self, total: int, done: int, *, shown: bool, doing: str = "writing") -> None:
        self._total = total
        self._done = done
        self._shown = shown
        self._doing = doing
        self._started = self._last = time.monotonic()
        self._first = done
        self._bar: Bar | None = None
        if shown and sys.stderr.isatty():
            columns = (
                TextColumn(doing),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(doing, total=total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, samples: int) -> None:
        """Count samples that are done."""
        self._done += samples
        if self._bar is not None:
            self._bar.update(self._task, advance=samples)
        elif samples and time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            rate = (self._done - self._first) / (self._last - self._started)
            self.say(f"{self._doing} {self._done} of {self._total} samples, {rate:.0f}/s, {(self._total - self._done) / rate:.0f} s left")

    def say(self, line: str) -> None:
        """Print a line."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)
