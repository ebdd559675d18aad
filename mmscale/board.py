"""TensorBoard: curves of a run and of its evaluations, and their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_OF_EVALUATION = ".evaluation"
"""End of the names of an evaluation's event files: its folder may be the user's and hold others."""


def open_board(folder: Path, resumed_at: int, suffix: str = "") -> Any:
    """Open a writer of event files; what was written of steps after `resumed_at` shows no more."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_at + 1, filename_suffix=suffix)


def add_scalars(board: Any, values: Mapping[str, float | None], step: int, prefix: str = "") -> None:
    """Write what is defined of some values."""
    for name, value in values.items():
        if value is not None:
            board.add_scalar(prefix + name, value, step)
    board.flush()


def write_evaluation(folder: Path, task: str, step: int, metrics: Mapping[str, float | None]) -> None:
    """Write an evaluation's metrics and the pictures that lie in its folder into one event file there, in place of an earlier one.

    Args:
        folder: of the evaluation.
        task: its name, before that of each metric and picture.
        step: of the checkpoint.
        metrics: by name; None for one that is undefined.
    """
    for old in folder.glob(f"events.out.tfevents.*{_OF_EVALUATION}"):
        old.unlink()
    board = open_board(folder, step - 1, _OF_EVALUATION)
    add_scalars(board, metrics, step, f"{task}/")
    for picture in sorted(folder.glob("*.png")):
        with Image.open(picture) as image:
            board.add_image(f"{task}/{picture.stem}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
    board.close()
