"""A limit on the time of each section of a run: one that overruns ends the run, with the ranks' stacks on file, instead of hanging.

Two guards, as what hangs may hold the interpreter's lock. A thread looks at the deadline every second: it can say what happened, mark
the status and choose the exit code, but needs the lock. A timer of the kernel (SIGALRM), due a little later, needs nothing: the handler
is faulthandler's, in C, which writes the stacks and lets the signal end the process. Setting the timer anew is one system call (1 us);
`faulthandler.dump_traceback_later` would end one thread and start another each time. No torch here: the launcher reads the exit code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from io import FileIO
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

from mmscale.run_folder import RunFolder

if TYPE_CHECKING:
    from mmscale.config import RunConfig
    from mmscale.world import World

logger = logging.getLogger(__name__)
Section = Literal["setup", "data", "step", "evaluate", "save"]
"""Parts of a run that have a limit of their own, `watchdog.SECTION_s`."""
OVERRAN = 87
"""Exit code of a rank whose section took longer than its limit."""
LOOK_S = 1.0
"""Time between looks at the deadline."""
LINGER_S = 5.0
"""How long a rank stays after it has said what happened: its end would cut short peers whose section ends a moment later."""
GRACE_S = 20.0
"""Time that the thread has to say it in, before the timer ends the process without it."""


@dataclass(frozen=True, slots=True)
class _Entered:
    section: Section
    step: int
    limit_s: float
    deadline: float
    """On the monotonic clock; infinite without a limit."""


class Watchdog:
    """Follows the sections of this process, from `with` to its end; there can be one in a process. Before, `enter` does nothing.

    Args:
        config: the run's limits and number of steps.
        folder: where the stacks go, `stacks/rank-N.txt`.
        world: who this rank is.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, world: World) -> None:
        self.folder, self.world, self.steps = folder, world, config.train.steps
        self._limits = {section: float(getattr(config.watchdog, f"{section}_s")) for section in get_args(Section)}
        self._entered: _Entered | None = None
        self._stacks: FileIO | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def enter(self, section: Section, step: int, *, anew: bool = False) -> None:
        """Begin a section, which ends the one before; entering the one that runs changes nothing, unless `anew`.

        Args:
            section: what begins.
            step: the step that it belongs to, counted from 1; 0 before the first.
            anew: begin the section's time anew where it runs already.
        """
        if self._stacks is None or (self._entered is not None and self._entered.section == section and not anew):
            return
        limit_s = self._limits[section]
        self._entered = _Entered(section, step, limit_s, time.monotonic() + limit_s if limit_s else float("inf"))
        signal.setitimer(signal.ITIMER_REAL, limit_s + GRACE_S if limit_s else 0)

    def __enter__(self) -> Watchdog:
        """Begin with the section `setup`."""
        path = self.folder.stacks(self.world.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = FileIO(path, "a")  # what an earlier launch left is evidence
        faulthandler.register(signal.SIGALRM, file=self._stacks, all_threads=True, chain=True)
        self._thread.start()
        self.enter("setup", 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop looking; a thread that is ending the process is waited for, so that the process ends as it wants."""
        assert self._stacks is not None
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._closed.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGALRM)
        self._stacks.close()
        self._stacks, path = None, self.folder.stacks(self.world.rank)
        with contextlib.suppress(OSError):  # shared with the other ranks
            if not path.stat().st_size:
                path.unlink()
                path.parent.rmdir()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_S):
            entered = self._entered
            if entered is not None and time.monotonic() > entered.deadline:
                self._end(entered)

    def _end(self, over: _Entered) -> None:
        """Write every thread's stack to the run folder, the rank's log and stderr, say what happened, and end the process."""
        assert self._stacks is not None
        signal.setitimer(signal.ITIMER_REAL, GRACE_S + LINGER_S)  # what follows may hang as well, on a disk or a lock
        said = self._paragraph(over)
        self._stacks.write(f"{time.strftime('%F %T')} {said}\n\n".encode())
        with FileIO(self.folder.log(self.world.rank), "a") as log:
            for descriptor in (self._stacks.fileno(), log.fileno(), 2):
                faulthandler.dump_traceback(file=descriptor, all_threads=True)
        os.write(2, f"mmscale: error: {said}\n".encode())  # not by sys.stderr, whose lock may be held
        if self.world.is_first:
            with contextlib.suppress(OSError):
                self.folder.write_status("failed", step=over.step, steps=self.steps, reason=said)
        logger.error("%s", said)
        time.sleep(LINGER_S)
        for child in multiprocessing.active_children():  # a worker that is stopped sees no end of its connection
            child.kill()
        os._exit(OVERRAN)

    def _paragraph(self, over: _Entered) -> str:
        where = f"at step {over.step} of {self.steps}" if over.step else "before the first step"
        key = f"watchdog.{over.section}_s"
        return (
            f"The section `{over.section}` of rank {self.world.rank} (process {os.getpid()} on {os.uname().nodename}) took longer than "
            f"{key} = {over.limit_s:g} s, {where}. The stacks of its threads are in {self.folder.stacks(self.world.rank)}. A rank that "
            "waits for another overruns too: at fault is the one whose stack is in no collective, or that has left none, because it was "
            f"stopped or its host is lost. Mend what hangs, or raise {key} if it was only slow (0 waits for ever). The same command goes "
            "on from the newest checkpoint."
        )
