"""Copying committed checkpoints to an object store while training goes on. A failure is told; training does not depend on copies."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

from mmscale.checkpoint.copies import Copies, Copy
from mmscale.checkpoint.find import committed, step_of
from mmscale.checkpoint.retention import is_pinned, kept, read_scores
from mmscale.config import RunConfig
from mmscale.recovery_config import CheckpointConfig
from mmscale.run_folder import RunFolder
from shards.errors import MmscaleError

logger = logging.getLogger(__name__)


class Copying:
    """One copy at a time, in a thread. Of checkpoints that are committed meanwhile, the newest comes next and the others are passed over.

    Args:
        copies: where they go.
        run: whose checkpoints they are.
        config: which are kept, there as in the run folder.
    """

    def __init__(self, copies: Copies, run: RunFolder, config: CheckpointConfig) -> None:
        self.copies, self.run, self.config = copies, run, config
        self.released: set[int] = set()
        """Steps that the run folder's retention has deleted: they are not pinned, whatever their copies say."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._current: Path | None = None
        self._next: Path | None = None

    @staticmethod
    def of(config: RunConfig, run: RunFolder) -> Copying | None:
        """What a configuration asks for."""
        url = config.checkpoint.copy_to
        return None if url is None else Copying(Copies(url, config.store), run, config.checkpoint)

    def start(self, folder: Path) -> None:
        """Have a committed checkpoint copied; returns at once."""
        with self._lock:
            self._next = folder
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="checkpoint-copy", daemon=True)
                self._thread.start()

    def spared(self) -> set[Path]:
        """The checkpoints that retention has to leave for now."""
        with self._lock:
            return {f for f in (self._current, self._next) if f is not None}

    def wait(self, limit_s: float) -> bool:
        """Wait until everything is copied, or given up.

        Returns:
            Whether that came about within the limit.
        """
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(limit_s)
        return thread is None or not thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._current, self._next = self._next, None
                if self._current is None:
                    self._thread = None
                    return
                folder = self._current
            try:
                self._copy(folder)
            except CancelledError:  # the process ends
                return
            except (MmscaleError, OSError) as e:
                logger.warning("ALERT the checkpoint of step %d was not copied: %s", step_of(folder), e)

    def _copy(self, folder: Path) -> None:
        start = time.perf_counter()
        copy, sent = self.copies.write(folder)
        seconds = time.perf_counter() - start
        if sent:
            place = f"{self.copies.root}/{copy.name}"
            logger.info("copied the checkpoint of step %d to %s in %.1f s, %.0f MiB/s", copy.step, place, seconds, sent / 2**20 / seconds)
        try:
            self._retain(copy)
        except MmscaleError as e:
            logger.warning("old copies could not be deleted: %s", e)

    def _retain(self, newest: Copy) -> None:
        """Keep what the rules keep; a pin in the run folder holds for its copy, and that of a copy whose folder was lost stays."""
        there = [c for c in self.copies.found() if c.is_whole]
        pinned = dict.fromkeys(set(self.released), False) | {step_of(f): is_pinned(f) for f in committed(self.run.checkpoints)}
        held = {c.step for c in there if pinned.get(c.step, c.is_pinned)}
        keep = kept({c.step for c in there}, held, self.config, read_scores(self.run, self.config))
        for name in self.copies.retain(newest, keep, pinned):
            logger.info("deleted the copy %s", name)
