"""Saving while training goes on: the state is copied into buffers that nobody else touches, and a thread writes those.

What the thread does (writing, hashing) runs outside of the interpreter's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmscale.checkpoint.pieces import Piece
from mmscale.checkpoint.tensor_file import total_bytes


class Snapshot:
    """A buffer in CPU memory, page-locked where the state lies on a CUDA device, that is used for every save of a run."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """Copy pieces into the buffer.

        Returns:
            Pieces whose values are the copies; the next call overwrites them.
        """
        aligned = [-(-p.values.numel() * p.values.element_size() // 8) * 8 for p in pieces]
        on_cuda = any(p.values.is_cuda for p in pieces)
        if self._bytes is None or self._bytes.numel() < sum(aligned):
            self._bytes = torch.empty(sum(aligned), dtype=torch.uint8, pin_memory=on_cuda)
        copies, at = [], 0
        for piece, size in zip(pieces, aligned, strict=True):
            used = total_bytes([piece])
            copy = self._bytes[at : at + used].view(piece.values.dtype)
            copy.copy_(piece.values, non_blocking=True)
            copies.append(replace(piece, values=copy))
            at += size
        if on_cuda:
            torch.cuda.synchronize()
        return copies


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended."""

    step: int
    seconds: float
    """From its start to its commit."""
    error: BaseException | None


class BackgroundSave:
    """Runs one save at a time in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None

    def start(self, step: int, save: Callable[[], object]) -> None:
        """Start a save; the one before must have been collected."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(step, save), name="checkpoint", daemon=True)
        self._thread.start()

    def collect(self, *, wait: bool) -> Outcome | None:
        """Take the outcome of a save that has ended, or, with `wait`, of the one that runs; None where there is none."""
        if self._thread is None or (not wait and self._thread.is_alive()):
            return None
        self._thread.join()
        self._thread = None
        return self._outcome

    def _run(self, step: int, save: Callable[[], object]) -> None:
        start = time.perf_counter()
        error: BaseException | None = None
        try:
            save()
        except BaseException as e:  # noqa: BLE001  (it is raised where it is collected)
            error = e
        self._outcome = Outcome(step, time.perf_counter() - start, error)
